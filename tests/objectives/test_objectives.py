"""What every objective promises, whichever it is: exactness on many processes, symmetry, finite numbers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trivium.datasets.registry import InputError
from trivium.objectives import OBJECTIVES, Embeddings, Objective, build, names
from trivium.objectives.temperature import Temperature
from trivium.pretrain.engine import prepare_deepspeed_environment

MODALITIES = ("text", "video", "audio")
CASES = {  # what is not here is tested with its default options
    "infonce": [
        {},
        {"anchor": "video", "label_smoothing": 0.1, "tile": 5},
        {"weights": {"text-video": 2.0, "text-audio": 1.0}, "learnable_temperature": False},
    ],
    "gram": [
        {},
        {"anchor": "audio", "label_smoothing": 0.0, "tile": 5},
        {"compat": "gram"},
    ],
    "unialign": [
        {},
        {"geometry": "geodesic", "anchor": "video", "detach_anchor": True, "tile": 5},
        {"centroid": False, "lambda_align": 0.3, "tau": 0.3},
    ],
    "siglip": [{}, {"anchor": "video", "temperature": 0.3, "bias": -1.0, "learnable_temperature": False, "tile": 5}],
    "holder": [{"tau": 0.5}, {"tau": 0.4, "taus": {"audio": 0.7}, "leave_one_out": True, "average_anchors": True}],
    "bucket": [{}, {"anchor": "audio", "alpha": 3.0, "lambda_neg": 0.5, "normalise": "negatives"}],
    "vicreg": [{"expander": [8, 7]}, {"expander": [], "invariance": 2.0}],
    "byol": [{"hidden": 8, "width": 6, "predictor_hidden": 7}],
    "simsiam": [{"hidden": 8, "width": 6, "predictor_hidden": 7}],
    "sink_anchored": [
        {"anchors": 6, "chosen": 3, "queue": 0},
        {"anchors": 5, "chosen": 2, "queue": 9, "design": "graded", "logit": "exp", "weights": {"text-audio": 0.1}},
    ],
    "sum": [
        {"terms": [{"name": "unialign"}, {"name": "bucket", "weight": 0.5}]},
        {"terms": [{"name": "infonce"}, {"name": "sink_anchored", "anchors": 4, "chosen": 2}, {"name": "infonce"}]},
    ],
}
EVERY_CASE = [(name, options) for name in names() for options in CASES.get(name, [{}])]
SAMPLES, WIDTH, DIM = 12, 6, 5


class Toy(nn.Module):
    """A small tower a modality, and the objective, as one module."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.towers = nn.ModuleDict({name: nn.Linear(WIDTH, DIM, bias=False) for name in MODALITIES})
        for tower in self.towers.values():
            nn.init.normal_(tower.weight, generator=generator)
        self.objective = objective

    def forward(self, x, valid):
        z = {name: F.normalize(self.towers[name](x[name]).tanh(), dim=-1) for name in MODALITIES}
        loss = self.objective(embeddings(z, valid, x))
        return loss._replace(total=loss.total + 0 * sum(value.sum() for value in z.values()))


def embeddings(z, valid=None, source=None) -> Embeddings:
    """With buckets that are a function of the sample, and features, for the objectives that need them."""
    text = (source or z)["text"]
    bucket = (text[:, 0] > 0).long() + 2 * (text[:, 1] > 0).long()
    return Embeddings(z, valid, bucket=bucket, features={name: 3 * x + 1 for name, x in z.items()})


def toy(name, options, log_scale=None, dtype=torch.float64):
    objective = build(name, **options)
    torch.manual_seed(0)
    objective.setup(MODALITIES, DIM, dict.fromkeys(MODALITIES, DIM))
    module = Toy(objective).to(dtype)
    if log_scale is not None:
        module.objective.temperature.log_scale.data.fill_(log_scale)
    return module


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for name in MODALITIES
    }


def scenarios() -> dict[str, dict[str, torch.Tensor]]:
    """Who has what, by scenario; bool (SAMPLES,) by modality."""
    generator = torch.Generator().manual_seed(2)

    def everyone():
        return {name: torch.ones(SAMPLES, dtype=torch.bool) for name in MODALITIES}

    def without(name, rows):
        valid = everyone()
        valid[name][rows] = False
        return valid

    uneven = {name: torch.rand(SAMPLES, generator=generator) < 0.7 for name in MODALITIES}
    for name in MODALITIES:
        uneven[name][:3] = False  # padding rows, on the first rank only
    one, nobody = everyone(), everyone()
    for name in MODALITIES:
        one[name][1:] = False
        nobody[name][:] = False
    return {
        "everyone": everyone(),
        "uneven": uneven,
        "audio missing on the last rank": without("audio", slice(6, None)),
        "audio missing everywhere": without("audio", slice(None)),
        "one sample": one,
        "nobody": nobody,
    }


def part(values, rank, world):
    own = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    return {name: x[own] for name, x in values.items()}


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def run_cases(rank: int, world: int, wrap, chosen: list[str] | None = None) -> dict:
    """Loss, parts and gradients of every case in the chosen scenarios, by default all."""
    found = {}
    for scenario in chosen or scenarios():
        valid = scenarios()[scenario]
        for index, (name, options) in enumerate(EVERY_CASE):
            temperature = getattr(build(name, **options), "temperature", None)
            learnt = isinstance(temperature, Temperature) and temperature.log_scale is not None
            for log_scale in (None, 6.0, -1.0) if learnt else (None,):  # within its bounds and beyond each
                module = toy(name, options, log_scale)
                wrapped = wrap(module)  # DDP must outlive the backward
                loss = wrapped(part(batch(), rank, world), part(valid, rank, world))
                loss.total.backward()
                found[scenario, name, index, log_scale] = loss.total.detach(), loss.parts, gradients(module)
    return found


def cases_on_a_rank(chosen: list[str] | None) -> dict:
    dist.init_process_group("gloo")
    return run_cases(dist.get_rank(), dist.get_world_size(), DistributedDataParallel, chosen)


@pytest.fixture(scope="module")
def one_process() -> dict:
    return run_cases(0, 1, lambda module: module)


def test_every_registered_objective_is_tested():
    assert {name for name, _ in EVERY_CASE} == set(names()) and set(CASES) <= set(names())


@pytest.mark.two_process
@pytest.mark.parametrize("world, chosen", [(2, None), (3, ["uneven", "audio missing on the last rank"])])
def test_many_processes_under_ddp_equal_one(ranks, one_process, world, chosen):
    answers = ranks(world, cases_on_a_rank, chosen)
    assert len(answers[0]) >= len(chosen or scenarios()) * len(EVERY_CASE)
    for case in answers[0]:
        total, parts, wanted = one_process[case]
        mean = sum(answer[case][0] for answer in answers) / world
        torch.testing.assert_close(mean, total, rtol=1e-9, atol=1e-9, msg=lambda m, case=case: f"{case}: {m}")
        for key, value in parts.items():
            mean = sum(answer[case][1][key] for answer in answers) / world
            torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-9, msg=lambda m, at=(case, key): f"{at}: {m}")
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for answer in answers:
            for key, gradient in answer[case][2].items():
                error = (gradient - wanted[key]).abs().max().item()
                assert error <= 1e-9 * max(largest, 1e-3), f"{case}, {key}: {error:g} of {largest:g}"


def test_the_scenarios_mean_something(one_process):
    """Whatever is there has a gradient, nothing else has; a temperature out of bounds is pulled back or held."""
    towers = {name: f"towers.{name}.weight" for name in MODALITIES}
    for case, (total, _, found) in one_process.items():
        scenario, objective, _, log_scale = case
        moving = {key for key, gradient in found.items() if gradient.abs().max() > 1e-12}
        if scenario == "nobody":
            assert not moving and total == 0, case
        elif scenario == "one sample":
            for name, key in towers.items():  # the gradient of weights is an outer product with what they were given
                x = F.normalize(batch()[name][0], dim=0)
                torch.testing.assert_close(found[key], torch.outer(found[key] @ x, x))
        elif scenario == "audio missing everywhere":
            assert not any("audio" in key for key in moving), case
            assert moving >= {towers["text"], towers["video"]} or (not moving and total == 0), case
        else:
            # the batch norm of the predictor takes away the bias in front of it
            still = {key for key in found if objective == "byol" and "projectors" in key and "linears.1.bias" in key}
            assert moving >= set(found) - still - {log_scale and "objective.temperature.log_scale"}, case
        if log_scale is not None:
            gradient = found["objective.temperature.log_scale"] * log_scale
            assert gradient >= 0, case  # descent along it leads inside, or nowhere
            if scenario == "everyone":  # unrelated vectors: a smaller scale is better, so 6 comes back and -1 stays
                assert (gradient > 0) == (log_scale > 0), case


def zero_on_a_rank(stage: int) -> dict | None:
    """One SGD step of size 1 with all objectives in one module: the change of a weight is minus its gradient."""
    from datetime import timedelta

    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    prepare_deepspeed_environment(gpus=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=60))],
    )
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    module = AllToys()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    engine, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))
    rank, world = accelerator.process_index, accelerator.num_processes
    loss = engine(part(batch(torch.float32), rank, world), part(scenarios()["uneven"], rank, world))
    accelerator.backward(loss.total)
    optimizer.step()
    after = accelerator.get_state_dict(engine)  # all ranks; ZeRO-3 gives it to the first only
    return after and {name: before[name] - after[name] for name in before}


class AllToys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.toys = nn.ModuleList(toy(name, options, dtype=torch.float32) for name, options in EVERY_CASE)

    def forward(self, x, valid):
        losses = [module(x, valid) for module in self.toys]
        return losses[0]._replace(total=sum(loss.total for loss in losses))


@pytest.mark.two_process
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_two_processes_equals_one(ranks, stage):
    module = AllToys()
    module(batch(torch.float32), scenarios()["uneven"]).total.backward()
    wanted = gradients(module)
    changes = ranks(2, zero_on_a_rank, stage)[0]
    for index, (name, options) in enumerate(EVERY_CASE):
        own = [key for key in wanted if key.startswith(f"toys.{index}.")]
        largest = max(wanted[key].abs().max().item() for key in own)
        for key in own:
            error = (changes[key] - wanted[key]).abs().max().item()
            assert error <= 1e-5 * largest, f"{name} {options}, {key}: {error:g} of {largest:g}"


@pytest.mark.parametrize("name, options", EVERY_CASE)
def test_the_order_of_the_batch_does_not_matter(name, options):
    x, valid, order = (
        batch(),
        scenarios()["uneven"],
        torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3)),
    )
    ours, theirs = toy(name, options), toy(name, options)
    a = ours(x, valid)
    b = theirs({key: v[order] for key, v in x.items()}, {key: v[order] for key, v in valid.items()})
    torch.testing.assert_close(a.total, b.total, rtol=1e-11, atol=1e-12)
    a.total.backward(), b.total.backward()
    for key, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, gradients(theirs)[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, options", [case for case in EVERY_CASE if hasattr(build(case[0], **case[1]), "tile")])
def test_tiles_do_not_matter(name, options):
    results = []
    for tile in (1, 5, 7, 1000):
        module = toy(name, {**options, "tile": tile})
        loss = module(batch(), scenarios()["uneven"])
        loss.total.backward()
        results.append({"total": loss.total.detach(), **gradients(module)})
    for other in results[:-1]:
        for key, value in results[-1].items():
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, options", EVERY_CASE)
def test_absent_samples_are_as_if_dropped(name, options):
    """Whatever they hold, NaN too, and whether or not they are in the batch."""
    x, valid = batch(), {key: torch.ones(SAMPLES, dtype=torch.bool) for key in MODALITIES}
    z = {key: F.normalize(value[:, :DIM], dim=-1) for key, value in x.items()}
    kept = torch.arange(SAMPLES) % 4 != 1
    for key in MODALITIES:
        valid[key][~kept] = False
        z[key][~kept] = torch.nan
    leaves = {key: value.clone().requires_grad_() for key, value in z.items()}
    fewer = {key: value[kept].clone().requires_grad_() for key, value in z.items()}
    a, b = (toy(name, options).objective(e) for e in (embeddings(leaves, valid), embeddings(fewer)))
    torch.testing.assert_close(a.total, b.total, rtol=1e-11, atol=1e-12)
    a.total.backward(), b.total.backward()
    for key in MODALITIES:
        torch.testing.assert_close(leaves[key].grad[kept], fewer[key].grad, rtol=1e-9, atol=1e-11)
        assert leaves[key].grad[~kept].eq(0).all()


@pytest.mark.parametrize("name, options", EVERY_CASE)
@pytest.mark.parametrize("collapsed", ["no", "modalities equal", "all samples equal"])
def test_finite_in_bfloat16(name, options, collapsed):
    z = {key: F.normalize(value[:, :DIM], dim=-1) for key, value in batch().items()}
    if collapsed != "no":
        z = {key: z["text"].clone() for key in z}
    if collapsed == "all samples equal":
        z = {key: value[:1].repeat(SAMPLES, 1) for key, value in z.items()}
    objective = toy(name, options, dtype=torch.float32).objective
    for scenario, valid in scenarios().items():
        leaves = {key: value.bfloat16().requires_grad_() for key, value in z.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(embeddings(leaves, valid))
        objective.zero_grad()
        loss.total.backward()
        assert loss.total.isfinite() and loss.total.dtype == torch.float32, scenario
        for tensor in (*leaves.values(), *objective.parameters()):  # without a gradient where a modality is left out
            assert tensor.grad is None or tensor.grad.isfinite().all(), scenario


@pytest.mark.parametrize("name", ["infonce", "gram", "siglip"])
@pytest.mark.parametrize("untrained", ["random", "cones"])
def test_float32_is_enough_at_scale_100(name, untrained):
    """Random vectors; or each modality in a cone of its own, text in the plane of the others, and two texts far off:
    scores 70 to 140 below the rest of their tile."""
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(3, 64, 512, generator=generator, dtype=torch.float64), dim=-1)
    if untrained == "cones":
        far, u, v = z[:, 0].clone()
        z = F.normalize(torch.stack([u + v, u, v])[:, None] + 0.2 * z, dim=-1)
        z[0, 0], z[0, 1] = far, -z[0, 1]
    found = []
    for dtype in (torch.float64, torch.float32):
        objective = build(name, temperature=0.01, temperature_range=(0.005, 1.0)).to(dtype)
        leaves = {key: x.to(dtype).requires_grad_() for key, x in zip(MODALITIES, z.clone(), strict=True)}
        total = objective(Embeddings(leaves)).total
        gradients = torch.autograd.grad(total, [*leaves.values(), *objective.parameters()])
        found.append((total.detach().double(), torch.cat([gradient.double().flatten() for gradient in gradients])))
    for exact, single in zip(*found, strict=True):
        assert (single - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("name, options", EVERY_CASE)
def test_autocast_changes_nothing(name, options):
    z = {key: F.normalize(value[:, :DIM].float(), dim=-1) for key, value in batch().items()}
    module = toy(name, options, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = {key: value.clone().requires_grad_() for key, value in z.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = module.objective(embeddings(leaves))
            loss.total.backward()
        results.append([loss.total.detach(), *(leaf.grad for leaf in leaves.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name, options", EVERY_CASE)
def test_training_goes_on_from_its_state_as_if_it_had_not_stopped(name, options):
    """Moving averages and queues are in the state, and nothing else is remembered."""

    def train(module, steps):
        losses = []
        for step in steps:
            loss = module({key: x.roll(step, 0) + step for key, x in batch().items()}, scenarios()["uneven"]).total
            module.zero_grad()
            loss.backward()
            for parameter in module.parameters():
                parameter.data -= 0.1 * parameter.grad
            module.objective.after_step(step / 5)
            losses.append(loss.detach())
        return torch.stack(losses)

    whole, resumed = toy(name, options), toy(name, options)
    train(whole, range(3))
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    assert torch.equal(train(whole, range(3, 5)), train(resumed, range(3, 5)))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_no_number_may_be_nan(name):
    least = CASES[name][0]
    numbers = [key for key, option in OBJECTIVES.parameters(name).items() if option.annotation is float]
    for option in numbers:
        with pytest.raises(InputError, match="nan"):
            build(name, **least | {option: float("nan")})


@pytest.mark.parametrize("name, options", EVERY_CASE)
def test_terms_add_up_and_parts_are_plain_numbers(name, options):
    z = {key: F.normalize(value[:, :DIM], dim=-1) for key, value in batch().items()}
    loss = toy(name, options).objective(embeddings(z))
    torch.testing.assert_close(sum(loss.terms.values()), loss.total)
    assert loss.parts and all(value.ndim == 0 and not value.requires_grad for value in loss.parts.values())


def test_the_docstring_explains_every_option():
    from trivium.objectives import OBJECTIVES

    for name in names():
        documented = OBJECTIVES.get(name).__doc__.split("Args:")[1]
        for option in OBJECTIVES.parameters(name):
            assert option in documented, f"{name}: {option} is not explained"
