"""Recipes and overrides become typed objects, or an error that names the nearest."""

from __future__ import annotations

import pytest
import yaml

from trivium.datasets.registry import InputError
from trivium.pretrain.config import Config, describe, load, recipes, save


def test_an_override_reaches_its_field_with_its_type():
    config = load("demo", ["train.lr=1e-4", "train.clip_norm=null", "data.workers=3", "evals.every=7", "run=a b/c"])
    assert config.train.lr == 1e-4 and config.train.clip_norm is None
    assert config.data.workers == 3 and config.evals.every == 7 and str(config.run) == "a b/c"


def test_a_name_alone_replaces_the_objective_with_its_options():
    with_options = load("demo", ["objective=gram", "objective.anchor=text"])
    assert with_options.objective.name == "gram" and with_options.objective.options == {"anchor": "text"}
    assert load("demo", ["objective.anchor=text", "objective=infonce"]).objective.options == {}
    named_again = load("demo", ["objective.anchor=video", "objective=unialign"]).objective
    assert named_again.name == "unialign" and named_again.options["anchor"] == "video"


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.lrr=1", ["train.lrr", "'lr'"]),
        ("objectve=gram", ["objectve", "'objective'"]),
        ("modalities.text.towr.width=3", ["modalities.text.towr", "'tower'"]),
        ("train.groups=[{match: a, lr_scal: 1}]", ["train.groups.0.lr_scal", "'lr_scale'"]),
        ("train.groups=[{match: a, lr_scale: -1}]", ["train.groups.0.lr_scale=-1", "multiplies train.lr"]),
        ("data.noise_words={text: {wrds: [a]}}", ["data.noise_words.text", "'words'"]),
        ("train.lr=fast", ["train.lr", "fast", "number", "learning rate"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.schedule=cosinus", ["train.schedule", "cosinus", "'cosine'"]),
        ("train.lr", ["train.lr", "key.subkey=value"]),
        ("seed.x=1", ["seed", "is a value"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_nearest(override, words):
    with pytest.raises(InputError) as error:
        load("demo", [override])
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'demo'"):
        load("deno")


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nname: mine\ntrain: {steps: 5}\nobjective: {name: gram}\n")
    mine, demo = load(str(tmp_path / "mine.yaml")), load("demo")
    assert mine.name == "mine" and mine.train.steps == 5 and mine.train.lr == demo.train.lr
    assert mine.objective.name == "gram" and mine.modalities == demo.modalities


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(f"extends: {path}\n")
    with pytest.raises(InputError, match="extends itself"):
        load(str(path))


@pytest.mark.parametrize("text, words", [("a: [", "not YAML"), ("just words", "key: value")])
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        load(str(path))


@pytest.mark.parametrize("name", recipes())
def test_the_resolved_configuration_is_the_same_recipe(name, tmp_path):
    config = load(name, ["objective=gram", "train.groups=[{match: video, lr_scale: 0.1}]"])
    save(config, tmp_path / "config.yaml")
    assert load(str(tmp_path / "config.yaml")) == config
    assert Config.model_validate(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


def test_every_option_has_a_meaning():
    lines = describe()
    assert {"train.lr", "data.corrupt_share", "modalities.NAME.tower.name"} <= set(lines)
    assert all(meaning and not meaning.startswith("None") for meaning in lines.values())
