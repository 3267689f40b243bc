"""Recipes of experiments: what they say, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest

from talos.app.experiments.plan import select
from talos.app.experiments.recipe import (
    TITLES,
    Recipe,
    read_recipe,
    recipe_names,
    recipe_of,
)
from talos.errors import TalosError, TalosOSError, TalosValueError
from talos.methods import METHODS

TASKS = 'models = ["minilm"]\ntasks = ["character_kind", "fragment_kind"]\n'
BASE = TASKS + '[[methods]]\nmethod = "talos"\n'


def read(folder: Path, text: str) -> Recipe:
    """Read a recipe of this text."""
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_of_the_package_can_be_read(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.rows
    assert Path("recipes", f"{name}.toml").samefile(Path("talos/app/recipes", f"{name}.toml"))
    assert json.loads(json.dumps(recipe.plain())) == recipe.plain()
    assert len({len(row.lr) for row in recipe.rows}) == 1  # as many rates to choose from


def test_every_method_has_a_title_and_a_place_in_a_study() -> None:
    assert set(TITLES) == set(METHODS)
    rows = [*read_recipe("text").rows, *read_recipe("causes").rows]
    assert {row.method for row in rows} == set(METHODS) - {"linearized"}


def test_a_row_for_each_combination_of_the_lists_but_for_rates(tmp_path: Path) -> None:
    text = (
        TASKS
        + """
[calibration]
soft = 0.1
density = 0.2
[training]
steps = 7
[[methods]]
method = "talos"
density = [0.05, 0.1]
rounds = [1, 4]
lr = [1e-3, 3e-4]
[[methods]]
method = "random"
title = "chance"
[[methods]]
method = "l_lora"
rank = 4
steps = 9
"""
    )
    rows = read(tmp_path, text).rows
    assert [row.row for row in rows] == [
        "talos-density-0.05-rounds-1",
        "talos-density-0.05-rounds-4",
        "talos-density-0.1-rounds-1",
        "talos-density-0.1-rounds-4",
        "random",
        "l_lora-rank-4-steps-9",
    ]
    assert rows[0].title == "TaLoS, density 0.05, rounds 1"
    assert (rows[4].title, rows[5].title) == ("chance", "L-LoRA, rank 4, steps 9")
    first = rows[0].calibration
    assert first is not None
    assert (first.density, first.rounds, first.soft, rows[0].lr) == (0.05, 1, 0.1, (3e-4, 1e-3))
    # The density of the calibration is that of the controls, too; the seed is that of the run.
    assert rows[4].settings == {"density": 0.2, "params": "maskable"}
    assert rows[5].settings == {"rank": 4, "lora_alpha": 16.0}
    assert (rows[4].training.steps, rows[5].training.steps) == (7, 9)
    assert rows[4].lr == (METHODS["random"].usual_lr,)


def test_a_merge_is_a_setting_of_a_row(tmp_path: Path) -> None:
    text = BASE + 'merge = ["mean", {method = "ties", density = 0.3}]\n'
    rows = read(tmp_path, text).rows
    assert [row.row for row in rows] == ["talos-merge-mean", "talos-merge-ties-density-0.3"]
    assert [row.title for row in rows] == ["TaLoS, merge mean", "TaLoS, merge ties density 0.3"]
    assert rows[1].merge == {"method": "ties", "density": 0.3}
    assert rows[0].training == rows[1].training


def test_files_lie_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "pets.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    text = """
models = ["model", {source = "minilm", name = "small"}]
tasks = ["pets.csv", {data = "pets.csv", name = "again", text = "review"}]
[[methods]]
method = "nonlinear"
"""
    recipe = read(tmp_path, text)
    assert recipe.models[0].source == str(tmp_path / "model")
    assert [each.name for each in recipe.models] == ["model", "small"]
    assert [each.data for each in recipe.tasks] == [str(tmp_path / "pets.csv")] * 2
    assert [each.title for each in recipe.tasks] == ["pets", "again"]
    assert recipe.tasks[1].settings == {"text": "review"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [", "RECIPE must be TOML"),
        ("", "models must be a list of at least one entry, got None"),
        (BASE.replace('["minilm"]', "[]"), "models must be a list of at least one entry"),
        (BASE.replace('["minilm"]', '["minilm", "minilm"]'), "models must differ"),
        (BASE.replace('["minilm"]', '[{source = "minilm", nme = "a"}]'), "did you mean name"),
        (BASE.replace('["minilm"]', "[3]"), "models must hold texts or tables with source"),
        (BASE.replace('"fragment_kind"', '"character_kind"'), "tasks must differ"),
        (BASE.replace(', "fragment_kind"', ""), "tasks must be at least two, got character_kind"),
        (BASE.replace('"fragment_kind"', '{data = ""}'), "data must be a text in one line"),
        (
            BASE.replace('"fragment_kind"', '"no.csv"'),
            "tasks must be files that exist, got .*no.csv",
        ),
        ("seeds = []\n" + BASE, "seeds must be a list of at least one entry"),
        ("seeds = [0, 0]\n" + BASE, "seeds must differ, got 0 twice"),
        ("seeds = [-1]\n" + BASE, "seeds must be integers from 0"),
        ("seeds = [1.5]\n" + BASE, "seeds must be integers from 0"),
        ("sed = [1]\n" + BASE, "did you mean seeds"),
        ('title = ""\n' + BASE, "title must be a text in one line"),
        (BASE + "[training]\nstep = 3\n", "did you mean steps"),
        (BASE + "[training]\nsteps = 0\n", r"\[training\] steps must be an integer of at least 1"),
        (BASE + "[training]\nsteps = true\n", "steps must be an integer of at least 1, got True"),
        (BASE + "[training]\nsizes = [1, 2]\n", "sizes must be three numbers"),
        (BASE + "[training]\nsizes = [1, 2, 0]\n", "sizes must be an integer of at least 1"),
        (BASE + "[training]\nweight_decay = nan\n", "weight_decay must be finite"),
        (BASE + '[training]\nautocast = "float8"\n', "autocast must be among bfloat16"),
        ("training = 3\n" + BASE, r"training must be a table \[training\], got 3"),
        (BASE + "[calibration]\ndensity = nan\n", r"density must lie in \(0, 1\], got nan"),
        (BASE + "[calibration]\nsoft = 0\n", "soft must lie in"),
        (
            BASE + '[calibration]\ndraws = "all"\n',
            "draws must be an integer of at least 1, or exac",
        ),
        (BASE + '[calibration]\nparams = "("\n', "params must be a preset or a regular expression"),
        (
            BASE + "[evaluation]\ncoefficients = 1\n",
            "coefficients must be an integer of at least 2",
        ),
        (BASE + '[evaluation]\nmeasures = ["add"]\n', "measures must be among addition"),
        (BASE + '[evaluation]\nmeasures = "addition"\n', "measures must be a list of names"),
        (BASE + '[evaluation]\nmeasures = ["drift", "drift"]\n', "measures must differ"),
        (BASE + '[evaluation]\npair = ["a", "b"]\n', "pair must be among character_kind"),
        (BASE + '[evaluation]\npair = ["character_kind"]\n', "pair must name two tasks"),
        (TASKS, "methods must be a list of at least one entry"),
        (TASKS + "methods = [{}]", "methods.* must hold texts or tables with method"),
        (BASE.replace('"talos"', '"tallos"'), "did you mean talos"),
        (BASE + "rank = 4\n", r"keys of \[\[methods\]\] with the method talos .* got rank"),
        (BASE + "seed = 4\n", "got seed"),
        (BASE + "density = []\n", "density must hold at least one value"),
        (BASE + "density = [0.1, 2]\n", r"density must lie in \(0, 1\], got 2"),
        (BASE + "density = [0.1, 0.1]\n", "density must differ, got 0.1 twice"),
        (BASE + 'density = "half"\n', r"density must lie in \(0, 1\], got 'half'"),
        (BASE + "lr = []\n", "lr must hold at least one value"),
        (BASE + "lr = [1e-3, 1e-3]\n", r"lr must differ.* leave one out; it is in .* number 1"),
        (BASE + "lr = inf\n", "lr must be positive and finite"),
        (BASE + "lr = 0\n", "lr must be positive and finite"),
        (BASE + 'lr = "1e-3"\n', "lr must be a positive number, got '1e-3'"),
        (BASE + 'disjoint = "yes"\n', "disjoint must be true or false"),
        (BASE + "disjoint = true\nrounds = 4\n", "rounds must be 1 with disjoint, got 4"),
        (BASE + 'disjoint = true\nselect = "highest"\n', "select must be 'lowest' with disjoint"),
        (BASE + 'draws = "exact"\nlabels = "importance"\n', "labels must be 'sampled' with the"),
        (BASE + "warmup = 100\n", "warmup must be an integer from 0 to the 80 steps, got 100"),
        (BASE + 'merge = "tie"\n', "merge must be among .*got 'tie'; did you mean ties"),
        (BASE + 'merge = {method = "ties", density = 2}\n', "merge: density must lie in"),
        (BASE + "merge = 3\n", "merge must be a name or a table"),
        (BASE + 'merge = {method = "mean", scaling_coef = 2}\n', "merge must have no scaling_coef"),
        (BASE + '[[methods]]\nmethod = "talos"\n', "methods.* must differ, got 'talos' twice"),
        (BASE + '[[methods]]\nmethod = "talos"\ndensity = 0.1\n', "with the same settings"),
        (BASE + '[[methods]]\nmethod = "nonlinear"\ntitle = "TaLoS"\n', "titles of .* must differ"),
        (BASE.replace('"talos"', '"l_lora"\nrank = 0'), "rank must be .*at least 1, got 0"),
        (BASE.replace('"talos"', '"l_lora"\nrank = "x"'), "rank must be .*got 'x'"),
        (BASE.replace('"talos"', '"lota"\nsparse_lr = nan'), "sparse_lr must be positive"),
        (BASE.replace('"talos"', '"random"\nparams = 3'), "params must be a text"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TalosError, match=message) as refused:
        read(tmp_path, text)
    assert "study.toml" in str(refused.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(TalosOSError, match=r"one of .*demo.*; did you mean demo\?"):
        read_recipe("dmo")
    with pytest.raises(TalosOSError, match="RECIPE must be a TOML file"):
        read_recipe(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TalosValueError, match="RECIPE must be TOML"):
        read_recipe(tmp_path / "bytes.toml")


def test_a_recipe_without_measures_may_have_one_task(tmp_path: Path) -> None:
    text = BASE.replace(', "fragment_kind"', "") + "[evaluation]\nmeasures = []\n"
    assert len(read(tmp_path, text).tasks) == 1


def test_a_part_of_a_recipe() -> None:
    recipe = read_recipe("density")
    part = select(recipe, ["talos*", "*_kind", "addition"])
    assert [row.row for row in part.rows] == [f"talos-density-{d}" for d in (0.1, 0.01, 0.3)]
    assert [task.title for task in part.tasks] == ["character_kind", "fragment_kind"]
    assert (part.models, part.evaluation.measures) == (recipe.models, ("addition",))
    assert select(recipe, []) == recipe
    with pytest.raises(TalosValueError, match=r"only must name .*, got taloss; did you mean talos"):
        select(read_recipe("text"), ["taloss"])
    with pytest.raises(TalosValueError, match="tasks must be at least two, got character_kind"):
        select(recipe, ["character_kind"])


def test_messages_name_no_file_where_a_command_made_the_recipe() -> None:
    content = {"models": ["minilm"], "tasks": ["a", "b"], "methods": ["talos"]}
    assert [row.row for row in recipe_of(content).rows] == ["talos"]
    with pytest.raises(TalosValueError, match=r"^\[training\] steps must be"):
        recipe_of({**content, "training": {"steps": 0}})
