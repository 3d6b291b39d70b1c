"""The weighted sum of objectives."""

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build


def vectors():
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(6, 4, generator=generator), dim=-1) for name in ("text", "video")}


def test_total_terms_and_parts():
    z = Embeddings(vectors(), bucket=torch.arange(6) % 2)
    terms = [{"name": "unialign", "tau": 0.5}, {"name": "bucket", "weight": 0.1}, {"name": "unialign"}]
    together = build("sum", terms=terms)
    first, bucket, second = build("unialign", tau=0.5)(z), build("bucket")(z), build("unialign")(z)
    loss = together(z)
    torch.testing.assert_close(loss.total, first.total + 0.1 * bucket.total + second.total)
    torch.testing.assert_close(loss.terms["bucket"], 0.1 * bucket.total)
    torch.testing.assert_close(loss.parts["unialign_2/alignment"], second.parts["alignment"])
    assert together.needs == {"bucket"}


def test_everything_reaches_the_summands():
    together = build("sum", terms=[{"name": "byol", "hidden": 4, "width": 3, "predictor_hidden": 4}])
    together.setup(("text", "video"), 4, {"text": 4, "video": 4})
    before = {name: value.clone() for name, value in together.state_dict().items() if "targets" in name}
    for parameter in together.parameters():
        parameter.data += 1
    together.after_step(0.0)
    assert before and all(not torch.equal(value, together.state_dict()[name]) for name, value in before.items())
    with pytest.raises(InputError, match="vidio"):
        build("sum", terms=[{"name": "gram", "anchor": "vidio"}]).check(("text", "video"))


@pytest.mark.parametrize(
    "terms, message",
    [
        ([], "terms is empty"),
        ([{"weight": 1.0}], "has no name"),
        ([{"name": "unialing"}], "unialign"),
        ([{"name": "gram", "weight": 0}], "weight=0.0 is not positive"),
        ([{"name": "gram", "weight": float("nan")}], "weight=nan is not positive"),
        ([{"name": "gram", "weight": "hot"}], "weight='hot' is no number"),
        ([{"name": "gram", "tau": 1}], "has no option 'tau'"),
    ],
)
def test_mistakes_are_named(terms, message):
    with pytest.raises(InputError, match=message):
        build("sum", terms=terms)
