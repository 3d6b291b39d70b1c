"""UniAlign against loops that follow eq. 9-14 literally; in float64 the exponentials of tau = 0.07 still exist."""

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.objectives import Embeddings, build
from trivium.objectives.unialign import angle_square

NAMES = ("text", "video", "audio")


def raw(n=6, dim=5, names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_() for name in names}


def unit(vectors):
    return {name: F.normalize(x, dim=-1) for name, x in vectors.items()}


def square_distance(x, y, geometry):
    return torch.arccos((x * y).sum()) ** 2 if geometry == "geodesic" else (x - y).square().sum()


def slow_uniformity(vectors, tau, geometry):
    """Eq. 9 of a list of vectors."""
    losses = []
    for i, x in enumerate(vectors):
        kernels = [torch.exp(-square_distance(x, y, geometry) / (2 * tau**2)) for j, y in enumerate(vectors) if j != i]
        if kernels:
            losses.append(torch.log(sum(kernels) / len(kernels)))
    return sum(losses) / max(len(losses), 1)


def slow(
    z, valid, anchor="text", geometry="euclidean", tau=0.07, tau_centroid=0.07, weights=None, detach=False, aligned=None
):
    """Each part of eq. 13."""
    n = len(z[anchor])
    parts = {f"uniformity/{m}": slow_uniformity([z[m][i] for i in range(n) if valid[m][i]], tau, geometry) for m in z}
    pairs = [(i, m) for m in z if m != anchor for i in range(n) if valid[m][i] and valid[anchor][i]]
    target = z[anchor].detach() if detach else z[anchor]
    distances = [square_distance(target[i], z[m][i], aligned or geometry) for i, m in pairs]
    parts["alignment"] = sum(distances) / max(len(pairs), 1)
    weights = weights or dict.fromkeys(z, 1.0)
    centroids = []
    for i in range(n):
        present = [m for m in weights if valid[m][i] and weights[m] > 0]
        if present:
            c = sum(weights[m] * z[m][i] for m in present)
            centroids.append(c / c.norm())
    parts["centroid_uniformity"] = slow_uniformity(centroids, tau_centroid, geometry)
    complete = [i for i in range(n) if all(valid[m][i] for m in z)]
    grams = [torch.stack([z[m][i] for m in z]) for i in complete]
    parts["volume"] = sum(torch.linalg.det(g @ g.T).sqrt() for g in grams) / max(len(complete), 1)
    return parts


def everyone(n=6, names=NAMES):
    return {name: torch.ones(n, dtype=torch.bool) for name in names}


def compare(options, valid=None, lambdas=(1, 1, 1), names=NAMES, **slow_options):
    valid = valid or everyone(names=names)
    ours, theirs = raw(names=names), raw(names=names)
    loss = build("unialign", **options)(Embeddings(unit(ours), valid))
    parts = slow(unit(theirs), valid, **slow_options)
    for name, value in loss.parts.items():
        expected = torch.as_tensor(parts[name], dtype=torch.float64).detach()
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    uni = sum(value for name, value in parts.items() if name.startswith("uniformity/"))
    volume = sum(parts[name] for name in ("centroid_uniformity", "volume") if name in loss.parts)
    expected = lambdas[0] * uni + lambdas[1] * parts["alignment"] + lambdas[2] * volume
    torch.testing.assert_close(loss.total, torch.as_tensor(expected), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sum(loss.terms.values()), loss.total)
    got = torch.autograd.grad(loss.total, list(ours.values()))
    wanted = torch.autograd.grad(expected, list(theirs.values()), allow_unused=True, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("geometry", ["euclidean", "geodesic"])
@pytest.mark.parametrize("tile", [1, 4, 2048])
def test_equation_13(geometry, tile):
    compare({"geometry": geometry, "tile": tile}, geometry=geometry)


@pytest.mark.parametrize("geometry, aligned", [("euclidean", "geodesic"), ("geodesic", "euclidean")])
def test_every_cell_of_table_4(geometry, aligned):
    compare({"geometry": geometry, "alignment_geometry": aligned}, geometry=geometry, aligned=aligned)


@pytest.mark.parametrize("names", [("text", "video"), (*NAMES, "depth")])
def test_two_and_four_modalities(names):
    compare({}, names=names)


def test_temperatures_and_weights_of_terms():
    options = {"tau": 0.2, "tau_centroid": 0.06, "lambda_uni": 0.5, "lambda_align": 2.0, "lambda_vol": 0.1}
    compare(options, lambdas=(0.5, 2.0, 0.1), tau=0.2, tau_centroid=0.06)


@pytest.mark.parametrize("centroid", [False, True])
@pytest.mark.parametrize("volume", [False, True])
def test_rows_of_table_2(centroid, volume):
    compare({"centroid": centroid, "volume": volume})


@pytest.mark.parametrize(
    "options, lambdas, parts",
    [
        ({"lambda_uni": 0}, (0, 1, 1), {"alignment", "centroid_uniformity", "volume"}),
        ({"lambda_align": 0}, (1, 0, 1), {*(f"uniformity/{m}" for m in NAMES), "centroid_uniformity", "volume"}),
        ({"lambda_vol": 0}, (1, 1, 0), {*(f"uniformity/{m}" for m in NAMES), "alignment"}),
    ],
)
def test_a_term_switched_off_is_not_computed(options, lambdas, parts):
    z = Embeddings(unit(raw()))
    assert set(build("unialign", **options)(z).parts) == parts
    compare(options, lambdas=lambdas)


def test_alignment_by_volume_alone():
    """Table 4, last row."""
    loss = build("unialign", lambda_uni=0, lambda_align=0, centroid=False)(Embeddings(unit(raw())))
    assert set(loss.parts) == {"volume"}


def test_anchor_and_its_detached_form():
    compare({"anchor": "audio"}, anchor="audio")
    compare({"anchor": "video", "detach_anchor": True}, anchor="video", detach=True)


def test_centroid_weights():
    weights = {"text": 2.0, "audio": 1.0}
    compare({"centroid_weights": weights}, weights=weights)


@pytest.mark.parametrize("geometry", ["euclidean", "geodesic"])
def test_missing_modalities_are_masked_exactly(geometry):
    valid = everyone()
    for name in NAMES:
        valid[name][1] = False
    valid["text"][0] = valid["audio"][0] = valid["audio"][3] = valid["video"][4] = False
    compare({"geometry": geometry, "tile": 4}, valid, geometry=geometry)


def test_a_modality_with_one_sample_or_none_has_no_uniformity():
    valid = everyone()
    valid["audio"][1:] = False
    compare({}, valid)
    valid["audio"][:] = False
    compare({}, valid)


def test_orthonormal_samples_in_perfect_agreement():
    z = torch.eye(6, dtype=torch.float64)
    loss = build("unialign")(Embeddings(dict.fromkeys(NAMES, z)))
    for name in NAMES:
        torch.testing.assert_close(loss.parts[f"uniformity/{name}"].item(), -2 / (2 * 0.07**2))
    torch.testing.assert_close(loss.parts["centroid_uniformity"].item(), -2 / (2 * 0.07**2))
    assert loss.parts["alignment"] == 0 and loss.parts["volume"] < 1e-9


def test_orthogonal_modalities_span_the_unit_cube():
    axes = torch.eye(3, dtype=torch.float64)
    z = {name: axes[k].repeat(4, 1) for k, name in enumerate(NAMES)}
    loss = build("unialign")(Embeddings(z))
    torch.testing.assert_close(loss.parts["volume"].item(), 1.0)
    torch.testing.assert_close(loss.parts["alignment"].item(), 2.0)
    assert loss.parts["uniformity/text"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_geodesic_angle(dtype):
    angles = torch.tensor([1e-3, 0.1, 1.0, 2.0, 3.1], dtype=dtype)
    quarter = (angles / 2).sin().square()
    torch.testing.assert_close(
        angle_square(quarter), angles.square(), rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=0
    )


@pytest.mark.parametrize("geometry", ["euclidean", "geodesic"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_are_finite_for_equal_and_for_opposite_vectors(geometry, sign):
    x = F.normalize(raw()["text"].detach().float(), dim=-1)
    z = {"text": x.clone(), "video": x.clone() * sign, "audio": x.clone()}
    z = {name: torch.cat([value, value[:2] * sign]).requires_grad_() for name, value in z.items()}
    loss = build("unialign", geometry=geometry)(Embeddings(z))
    loss.total.backward()
    assert loss.total.isfinite() and all(value.grad.isfinite().all() for value in z.values())


@pytest.mark.parametrize("geometry", ["euclidean", "geodesic"])
def test_float32_is_close_to_float64(geometry):
    exact = build("unialign", geometry=geometry)(Embeddings(unit(raw())))
    single = build("unialign", geometry=geometry)(Embeddings({name: x.float() for name, x in unit(raw()).items()}))
    torch.testing.assert_close(single.total.item(), exact.total.item(), rtol=2e-6, atol=0)


def test_samples_are_pushed_apart():
    """A step along the negative gradient of the uniformity increases the smallest distance."""
    vectors = raw(n=4)
    build("unialign", lambda_align=0, lambda_vol=0)(Embeddings(unit(vectors))).total.backward()
    with torch.no_grad():
        moved = {name: x - 1e-4 * x.grad for name, x in vectors.items()}
        for name in NAMES:
            before, after = (torch.pdist(unit(v)[name]).min().item() for v in (vectors, moved))
            assert after > before and not math.isclose(after, before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": 0}, "tau=0"),
        ({"tau": math.nan}, "tau=nan"),
        ({"centroid_weights": {"text": math.nan}}, "centroid_weights.text=nan"),
        ({"tau_centroid": -1.0}, "tau_centroid"),
        ({"lambda_uni": -1.0}, "lambda_uni"),
        ({"lambda_uni": 0, "lambda_align": 0, "centroid": False, "volume": False}, "every term"),
        ({"centroid_weights": {"text": 0.0}}, "centroid_weights"),
        ({"geometry": "hyperbolic"}, "geometry"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build("unialign", **options)


def test_options_that_do_not_fit_the_model():
    with pytest.raises(InputError, match="did you mean 'video'"):
        build("unialign", centroid_weights={"vidio": 1.0}).check(NAMES)
    with pytest.raises(InputError, match="did you mean 'text'"):
        build("unialign", anchor="txt").check(NAMES)
