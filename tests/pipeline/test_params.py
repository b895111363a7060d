"""The design is typed, merged in one order, and refused with one clear line."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.pipeline import params
from lib.pipeline import profile as pipeline
from lib.pipeline.params import ParamsError

ROOT = Path(__file__).parents[2]


TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
# Of the paper's rows, which have one of every kind.
SMOKE = {
    "pretrained": ["mixed_8k"],
    "continued": ["warm_32k"],
    "distilled": [],
    "retrievers": ["reads_32k", "opl"],
    "published": [],
    "baselines": ["bm25"],
    "ablations": ["loss"],
}


ALWAYS = {"pretrained": "warm_32k", "allow_test_training": "always"}


def changed(*changes: tuple) -> dict:
    """The committed settings with the paper's rows as the tables, and some of these rows at smoke.

    Different in a few places: ("finetune.laptop.lr", 3).
    """
    design = params.load(ROOT / "params.yaml")
    own = {"rows": {"smoke": copy.deepcopy(SMOKE)}, "groups": params.groups(design, "paper")}
    design = copy.deepcopy(design | params.select(design, "paper") | own)
    for place, value in changes:
        *above, last = place.split(".")
        section = design
        for key in above:
            section = section.setdefault(key, {})
        section[last] = value
    return design


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(change, …): a repository folder with the changed design, as working directory."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)

    def write(*changes):
        text = json.dumps(changed(*changes))  # JSON is YAML, but for the numbers that are keys
        (tmp_path / "params.yaml").write_text(re.sub(r'"(\d+)":', r"\1:", text), encoding="utf-8")

    return write


def refused(text: str, *parts: str) -> None:
    """The message is one line and holds every part."""
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_the_committed_design_loads_and_every_profile_has_settings_for_every_row():
    design = params.load(ROOT / "params.yaml")
    for profile in design["lengths"]:
        for stage in params.STAGES:
            assert params.settings(profile, stage).keys() == design[stage]["base"].keys()
        for table in params.MODELS:
            stage = "pretrain" if table in params.TRAINED_BY["pretrain"] else "finetune"
            for row in params.rows(profile, table):
                assert (
                    params.settings(profile, stage, row)
                    and params.settings(profile, "model", row).keys()
                    == design["model"]["base"].keys()
                )
                assert params.length(profile, params.paper_length(row, profile)) > 0


def test_a_row_overrides_its_profile_and_a_profile_overrides_base(edit):
    edit(
        ("finetune.base.seeds", [1]),
        ("finetune.laptop.seeds", [2]),
        ("retrievers.opl.seeds", [3]),
        ("finetune.base.warmup", 0.25),
    )
    assert params.settings("smoke", "finetune")["seeds"] == [1]
    assert (
        params.settings("laptop", "finetune")["seeds"]
        == params.settings("laptop", "finetune", "reads_2k")["seeds"]
        == [2]
    )
    assert params.settings("laptop", "finetune", "opl")["seeds"] == [3]
    assert params.settings("laptop", "finetune", "opl")["warmup"] == 0.25


def test_a_row_is_trained_once_for_each_of_its_seeds(edit):
    """The first seed's model is the row's own, the others' lie below it."""
    edit(("finetune.laptop.seeds", [9, 7]), ("retrievers.opl.seeds", [3, 5, 4]))
    assert params.trainings("laptop", "opl") == {3: "opl", 5: "opl/seed_5", 4: "opl/seed_4"}
    assert params.trainings("laptop", "mnrl") == {9: "mnrl", 7: "mnrl/seed_7"}
    assert params.trainings("smoke", "mnrl") == {42: "mnrl"}
    places = {9: "prototype_32k", 7: "prototype_32k/seed_7"}
    assert params.trainings("laptop", "prototype_32k") == places
    assert params.trainings("laptop", "mixed_2k") == {17: "mixed_2k"}
    assert params.trainings("laptop", "bm25") == {0: "bm25"}
    for seeds in ([], [1, 1]):
        edit(("retrievers.opl.seeds", seeds))
        with pytest.raises(ParamsError) as error:
            params.load()
        refused(str(error.value), "retrievers.opl.seeds", "different", str(seeds))


def test_each_training_starts_from_another_model_as_long_as_there_are_some(edit):
    """Third training from the third model; one more than there are begins with the first again."""
    edit(
        ("pretrained.mixed_2k.seeds", [1, 2]),
        ("retrievers.mixed.seeds", [3, 5, 4]),
    )
    assert params.starts("laptop", "mixed") == {3: "mixed_2k", 5: "mixed_2k/seed_2", 4: "mixed_2k"}
    assert params.starts("laptop", "opl") == {42: "warm_32k"}
    assert params.starts("laptop", "prototype_32k") == {42: "warm_32k"}
    assert params.starts("laptop", "mixed_2k") == {}
    edit(("distilled.prototype_32k.seeds", [1, 2]), ("retrievers.prototype.seeds", [3, 4]))
    assert params.starts("laptop", "prototype_32k") == {1: "warm_32k", 2: "warm_32k"}
    places = {3: "prototype_32k", 4: "prototype_32k/seed_2"}
    assert params.starts("laptop", "prototype") == places


def test_a_rate_by_length_stands_between_the_profile_and_the_row(edit):
    """The authors' YAMLs for 128 tokens have 8e-4, the paper's long models 5e-4."""
    edit()
    values = params.settings("paper", "pretrain", "mixed_128")
    assert values["lr"] == values["embedding_lr"] == 8e-4
    assert params.settings("paper", "pretrain", "mixed_2k")["lr"] == 5e-4
    edit(("pretrained.mixed_128.lr", 1e-3), ("pretrain.paper.lr", 2e-4))
    values = params.settings("paper", "pretrain", "mixed_128")
    assert (values["lr"], values["embedding_lr"]) == (1e-3, 8e-4)
    assert params.settings("paper", "pretrain", "mixed_2k")["lr"] == 2e-4
    edit(("pretrain.laptop.lr_by_length", {"129": 1e-3}))
    with pytest.raises(params.ParamsError, match="lr_by_length"):
        params.load()


def test_what_is_the_papers_in_pretraining_is_left_out_where_bits_must_stay(edit):
    edit()
    dropped = {p: params.settings(p, "pretrain")["dropout"] for p in params.load()["lengths"]}
    assert dropped == {"smoke": 0, "laptop": 0, "study": 0, "real": 0, "gpu": 0, "paper": 0.1}


def test_a_models_shape_is_that_of_the_row_pretrained_from_scratch(edit):
    edit(("pretrained.mixed_8k.hidden_size", 48))
    assert params.settings("laptop", "model", "mixed_8k")["hidden_size"] == 48
    assert (
        params.settings("laptop", "model", "opl")["hidden_size"] == 48
    )  # opl <- warm_32k <- mixed_8k
    assert "hidden_size" not in params.settings("laptop", "pretrain", "mixed_8k")
    assert params.settings("laptop", "pretrain", "warm_32k")["pretrained"] == "mixed_8k"
    assert params.paper_length("opl") == 32768


def test_a_profile_runs_its_rows_and_an_ablation_what_is_left_of_its_own(edit):
    edit(
        (
            "rows.smoke",
            {
                "retrievers": ["opl", "reads_32k"],
                "pretrained": ["mixed_8k"],
                "distilled": [],
                "ablations": ["loss"],
            },
        )
    )
    assert list(params.rows("smoke", "retrievers")) == ["reads_32k", "opl"]  # the file's order
    assert params.rows("smoke", "ablations")["loss"]["rows"] == [
        r for r in params.rows("laptop", "ablations")["loss"]["rows"] if r in ("opl", "reads_32k")
    ]
    assert params.rows("laptop", "retrievers") == params.load()["retrievers"]


def test_the_papers_rows_have_the_papers_rates_and_negatives():
    """They have names of laptop's rows, and take nothing from them."""
    for row, own in params.rows("paper", "retrievers").items():
        values = params.settings("paper", "finetune", row)
        assert (values["lr"], values["embedding_lr"], values["lr_choices"]) == (5e-6, 5e-6, []), row
        assert values["negatives"] == 32 and own["pretrained"] == values["pretrained"], row


def test_a_profile_with_rows_of_its_own_does_not_run_in_place(edit):
    """DVC's stages in the root are the rows of the tables."""
    edit(("profile", "smoke"))
    with pytest.raises(
        ParamsError, match="profile: smoke has rows of its own.*repro PROFILE=smoke"
    ):
        params.load()


def test_a_profile_has_rows_of_its_own_and_changes_others(edit):
    """A change is laid over the row of that name; the other profiles do not see it."""
    edit(
        (
            "rows.smoke.retrievers",
            {
                "reads_32k": {"seeds": [1, 2, 3]},
                "opl": {},
                "opl_64": {"pretrained": "warm_32k", "loss": "opl", "documents": 64},
            },
        ),
        ("rows.smoke.ablations", {"loss": {"rows": ["opl_64", "opl", "mnrl"]}}),
    )
    assert list(params.rows("smoke", "retrievers")) == ["reads_32k", "opl", "opl_64"]
    changed_row = params.settings("smoke", "finetune", "reads_32k")
    assert changed_row["seeds"] == [1, 2, 3] and changed_row["pretrained"] == "warm_32k"
    assert params.settings("smoke", "finetune", "opl_64")["documents"] == 64
    assert params.trainings("smoke", "reads_32k")[3] == "reads_32k/seed_3"
    assert params.paper_length("opl_64", "smoke") == 32768
    assert params.rows("smoke", "ablations")["loss"]["rows"] == ["opl_64", "opl"]
    assert "opl_64" in params.rows("smoke", "evaluated")
    assert params.settings("laptop", "finetune", "reads_32k")["seeds"] == [42, 43]
    with pytest.raises(ParamsError, match="unknown row of .* 'opl_64'; did you mean 'opl'"):
        params.settings("laptop", "finetune", "opl_64")


def test_a_setting_for_one_run_is_that_of_its_profile_alone(edit):
    """Profiles that share their settings by an anchor of the file share one dict."""
    edit()
    small = {"hidden_size": 128}
    design = params.load() | {"model": params.load()["model"] | {"study": small, "real": small}}
    given = pipeline.changed(design, "study", {"set": ["model.hidden_size=64"]})
    assert given["model"]["study"] == {"hidden_size": 64}
    assert given["model"]["real"] == small == {"hidden_size": 128}


def test_a_group_is_what_its_profile_runs_of_it_with_what_that_is_built_on(edit):
    edit(
        (
            "groups",
            {
                "loss": {"ablations": ["loss"], "lessons": ["paper_audit", "losses"]},
                "length": {"ablations": ["warm_start"], "rows": ["reads_128", "bm25"]},
                "books": {"rows": ["reads_2k"]},
            },
        )
    )
    loss = params.group("smoke", "loss")
    rows = ["reads_32k", "opl"]  # the file's order
    assert loss == {"ablations": ["loss"], "rows": rows, "lessons": ["paper_audit", "losses"]}
    assert params.needs("smoke", loss["rows"]) == {"reads_32k", "opl", "warm_32k", "mixed_8k"}
    assert params.group("laptop", "length") == {
        "ablations": ["warm_start"],
        "rows": ["reads_128", "warm", "cold", "bm25"],
        "lessons": [],
    }
    assert params.group("smoke", "length") == {
        "ablations": [],
        "rows": ["bm25"],
        "lessons": [],
    }
    assert {"prototype_32k", "reads_128", "mixed_128"} <= params.needs("laptop", ["prototype"])
    assert list(params.groups(params.load(), "smoke")) == ["loss", "length"]
    with pytest.raises(ParamsError, match="unknown group of smoke 'books'; there is loss, length"):
        params.group("smoke", "books")


def test_places_follow_the_working_directory(edit, tmp_path, monkeypatch):
    edit()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert params.root() == tmp_path
    assert (
        params.data("laptop") == tmp_path / "data"
        and params.data("smoke") == tmp_path / ".work" / "smoke" / "data"
    )
    assert (
        params.output("data/scratch") == tmp_path / "data" / "scratch"
        and (tmp_path / "data" / "scratch").is_dir()
    )
    monkeypatch.chdir("/")
    with pytest.raises(ParamsError, match="start from the repository"):
        params.root()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("finetun", {}), ("finetun", "did you mean 'finetune'")),
        (("finetune.laptop.leraning_rate", 1.0), ("finetune.laptop", "leraning_rate")),
        (("pretrain.smoke.tokns", 5), ("pretrain.smoke", "tokns", "did you mean 'tokens'")),
        (("pretrain.laptp", {}), ("laptp", "did you mean 'laptop'")),
        (("pretrain.laptop", None), ("pretrain.laptop", "{}")),
        (("finetune.laptop.lr", "2e-3"), ("finetune.laptop.lr", "a number", "'2e-3'")),
        (("finetune.laptop.lr", -1.0), ("finetune.laptop.lr", "at least 0")),
        (
            ("retrievers.opl.lr_choices", [1e-3]),
            ("retrievers.opl.lr_choices", "two or more different rates", "[0.001]"),
        ),
        (("retrievers.opl.lr_choices", [1e-3, 1e-3]), ("opl.lr_choices", "different rates")),
        (("retrievers.opl.lr_choices", [0.0, 1e-3]), ("opl.lr_choices", "above 0")),
        (
            ("retrievers.opl", {"pretrained": "warm_32k", "lr": 0.0, "lr_choices": [1e-4, 1e-3]}),
            ("retrievers.opl.lr_choices: want an lr above 0",),
        ),
        (("finetune.laptop.documents", 1.5), ("finetune.laptop.documents", "a whole number")),
        (
            ("finetune.laptop.documents", True),
            ("finetune.laptop.documents", "whole number", "True"),
        ),
        (("finetune.laptop.documents", 0), ("finetune.laptop.documents", "at least 1")),
        (
            ("pretrain.base.mask_rat", 0.3),
            ("pretrain.base", "mask_rat", "did you mean 'mask_rate'"),
        ),
        (("evaluate.base", {"depth": 10}), ("evaluate.base", "'batch_size' is missing")),
        (("pretrain.base.mask_rate", 1.3), ("pretrain.base.mask_rate", "between 0 and 1")),
        (("pretrain.base.warmup", float("nan")), ("pretrain.base.warmup", "out of range")),
        (("data.laptop.books", [512, "1024"]), ("data.laptop.books[1]", "'1024'")),
        (("data.laptop.books", 512), ("data.laptop.books", "a list")),
        (("compute.laptop.threads", 0), ("compute.laptop.threads", "at least 1")),
        (("retrievers.opl.loss", "olp"), ("retrievers.opl.loss", "'olp'", "did you mean 'opl'")),
        (("retrievers.opl.lenght", 128), ("retrievers.opl", "lenght")),
        (("retrievers.opl", {"loss": "opl"}), ("retrievers.opl", "'pretrained' is missing")),
        (
            ("retrievers.opl.pretrained", "warm_32"),
            ("retrievers.opl.pretrained", "'warm_32'", "did you mean 'warm_32k'"),
        ),
        (("retrievers.mixed_8k", {"pretrained": "mixed_8k"}), ("mixed_8k", "the only one")),
        (("retrievers.Upper; rm", {"pretrained": "mixed_8k"}), ("Upper; rm", "no name")),
        (("pretrained.mixed_8k.length", 8191), ("pretrained.mixed_8k.length", "8191", "8192")),
        (("ablations.loss.rows", ["reads_32k", "old"]), ("ablations.loss.rows", "'old'")),
        (("ablations.loss.notebook", "../evil"), ("ablations.loss.notebook", "../evil")),
        (
            ("continued.warm_32k.pretrained", "warm_32k"),
            ("wait for each other", "warm_32k <- warm_32k"),
        ),
        (
            ("retrievers.reads_128.pretrained", "prototype_32k"),
            ("wait for each other", "reads_128"),
        ),
        (("lengths.laptop", {128: 128}), ("lengths.laptop", "2048")),
        (("profile", "labtop"), ("profile", "did you mean 'laptop'")),
        (("published.theirs", {}), ("published.theirs", "'checkpoint' is missing")),
        (
            ("published.theirs", {"checkpoint": "a/b", "length": 128}),
            ("published.theirs", "length", "did you mean 'max_length'"),
        ),
        (
            ("published.theirs", {"checkpoint": "a/b", "max_length": "2k"}),
            ("published.theirs.max_length", "whole number"),
        ),
        (
            ("published.theirs", {"checkpoint": "a/b", "max_length": -5}),
            ("published.theirs.max_length", "at least 1"),
        ),
        (("published.theirs", {"checkpoint": 7}), ("published.theirs.checkpoint", "wants text")),
        (("published.opl", {"checkpoint": "a/b"}), ("published.opl", "the only one")),
        (("published.theirs", {"checkpoint": "a/b"}), ("evaluated", "retrievers and published")),
        (
            ("rows.smoke.retrievers", ["reads_129"]),
            ("rows.smoke.retrievers", "reads_129", "did you mean"),
        ),
        (
            ("baselines.theirs", {"modle": "a/b"}),
            ("baselines.theirs", "modle", "did you mean 'model'"),
        ),
        (
            ("baselines.theirs", {"model": "a/b", "chunk": "sum"}),
            ("baselines.theirs.chunk", "'sum'", "mean, max, best"),
        ),
        (("baselines.theirs", {"chunk": "mean"}), ("baselines.theirs.chunk", "without 'model'")),
        (
            ("baselines.theirs", {"model": "a/b", "window": 100}),
            ("baselines.theirs.window", "without 'chunk'"),
        ),
        (
            ("baselines.theirs", {"model": "m", "url": "https://e.org", "key": "sk-abc123"}),
            ("baselines.theirs.key", "name of the environment variable"),
        ),
        (
            ("baselines.theirs", {"model": "m", "url": "https://e.org", "query_options": ["a"]}),
            ("baselines.theirs.query_options", "keys and values"),
        ),
        (
            ("baselines.theirs", {"model": "m", "url": "http://evil.org/v1"}),
            ("baselines.theirs.url", "https://"),
        ),
        (
            ("baselines.theirs", {"model": "m", "url": "https://e.org", "chunk": "best"}),
            ("baselines.theirs.chunk", "`window`"),
        ),
        (
            ("baselines.theirs", {"model": "m", "chunk": "best", "first_tokens": 128}),
            ("baselines.theirs", "one of the two"),
        ),
        (
            ("baselines.theirs", {"model": "m", "chunk": "best", "window": 10, "stride": 50}),
            ("baselines.theirs.stride", "window=10"),
        ),
        (
            ("distilled.prototype_32k.teacher", "reads_129"),
            ("distilled.prototype_32k.teacher", "did you mean 'reads_128'"),
        ),
        (
            ("distilled.prototype_32k.teacher", "bm25"),
            ("distilled.prototype_32k.teacher: 'bm25' is BM25, which has no vectors", "`model`"),
        ),
        (
            ("distilled.prototype_32k.teacher", "minilm"),
            ("distilled.prototype_32k.teacher: 'minilm' is a baseline", "`minilm: {}` to teachers"),
        ),
        (("teachers.bm25", {}), ("teachers.bm25: 'bm25' is BM25", "name a baseline with `model`")),
        (("teachers.minilmm", {}), ("teachers.minilmm", "did you mean 'minilm'")),
        (("teachers.minilm", {"chunk": "mean"}), ("teachers.minilm", "unknown key 'chunk'")),
        (
            ("retrievers.opl.pretraining_texts", 4),
            ("retrievers.opl.pretraining_texts", "loss: prototype"),
        ),
        (
            ("evaluate.laptop.also", ["../mirror"]),
            ("evaluate.laptop.also", "'../mirror'", "absolute path"),
        ),
        (("evaluate.laptop.also", [7]), ("evaluate.laptop.also", "7")),
        (("rows.smok", {}), ("smok", "did you mean 'smoke'")),
        (("rows.smoke.retrievers", "opl"), ("rows.smoke.retrievers", "a list of rows", "'opl'")),
        (("rows.smoke.retrievers", {"opl": None}), ("rows.smoke.retrievers", "its changes")),
        (
            ("rows.smoke.retrievers", {"opl": {"los": "opl"}}),
            ("rows.smoke: retrievers.opl", "'los'", "did you mean 'loss'"),
        ),
        (
            ("rows.smoke.retrievers", {"olp": {"loss": "opl"}}),
            ("rows.smoke: retrievers.olp", "'pretrained' is missing"),
        ),
        (
            ("rows.smoke.retrievers", {"mixed_8k": {"pretrained": "mixed_8k"}}),
            ("rows.smoke: retrievers.mixed_8k", "the only one"),
        ),
        (
            ("rows.smoke.retrievers", {"mine": {"pretrained": "warm_32"}}),
            ("rows.smoke: retrievers.mine.pretrained", "'warm_32'", "did you mean 'warm_32k'"),
        ),
        (("finetune.laptop.allow_test_training", "allways"), ("did you mean 'always'",)),
        (
            ("finetune.laptop.allow_test_training", "always"),
            ("finetune.laptop.allow_test_training", "a row of retrievers"),
        ),
        (
            ("retrievers.opl.allow_test_training", "always"),
            ("retrievers.opl.allow_test_training", "begin its name with trained_on_test"),
        ),
        (
            ("distilled.prototype_32k.allow_test_training", "always"),
            ("distilled.prototype_32k.allow_test_training", "a row of retrievers"),
        ),
        (
            ("retrievers.trained_on_test", ALWAYS | {"loss": "none"}),
            ("retrievers.trained_on_test.allow_test_training", "trains nothing"),
        ),
        (("groups.loss.ablation", ["loss"]), ("groups.loss", "did you mean 'ablations'")),
        (("groups.loss.ablations", ["los"]), ("groups.loss.ablations", "did you mean 'loss'")),
        (("groups.loss.rows", ["op"]), ("groups.loss.rows", "'op'")),
        (("rows.smoke.ablations", ["mixture"]), ("rows.smoke", "mixture", "leave it out")),
        (("rows.smoke.continued", []), ("rows.smoke", "needs 'warm_32k'", "rows.smoke.continued")),
    ],
)
def test_a_wrong_design_is_refused_by_name(change, parts):
    with pytest.raises(ParamsError) as error:
        params.check(changed(change))
    refused(str(error.value), *parts)


def test_nothing_learns_from_a_row_that_is_trained_on_test():
    row = ("retrievers.trained_on_test", ALWAYS)
    evaluated = changed(row)["retrievers"]
    params.check(changed(row, ("evaluated", evaluated)))
    with pytest.raises(ParamsError) as error:
        params.check(changed(row, ("distilled.prototype_32k.teacher", "trained_on_test")))
    refused(str(error.value), "distilled.prototype_32k.teacher", "is trained on test")


def test_a_teacher_has_one_vector_for_each_text():
    best = {"model": "m", "url": "https://e.org", "chunk": "best", "window": 100}
    for table in ("teachers.theirs", "distilled.prototype_32k.teacher"):
        change = (table, {} if table.startswith("teachers") else "theirs")
        with pytest.raises(ParamsError) as error:
            params.check(changed(("baselines.theirs", best), change))
        refused(str(error.value), f"{table}: 'theirs' has a vector for each window", "mean or max")


def test_a_profile_has_the_teachers_that_its_distilled_rows_name(edit):
    teacher = ("distilled.prototype_32k.teacher", "minilm")
    edit(teacher, ("teachers", {"minilm": {}, "minilm_chunks": {}}))
    assert params.rows("gpu", "teachers") == {"minilm": {}}
    assert params.rows("smoke", "teachers") == {}
    with pytest.raises(ParamsError) as error:
        rows = {**params.load()["rows"]["smoke"], "distilled": ["prototype_32k"]}
        params.check(changed(teacher, ("teachers", {"minilm": {}}), ("rows.smoke", rows)))
    refused(str(error.value), "rows.smoke", "needs 'minilm' (teacher)", "rows.smoke.baselines")


def test_the_message_names_the_file(edit):
    edit(("retrievers.opl.loss", "olp"))
    with pytest.raises(
        ParamsError,
        match=r"^params.yaml: retrievers.opl.loss: unknown value 'olp'; did you mean 'opl'\?$",
    ):
        params.load()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("profile: laptop\nmodel: [1, 2\n", ("line ",)),
        ("profile: laptop\nprofile: smoke\n", ("line 2", "duplicate")),
        ("profile: !!python/object/apply:os.system ['touch hacked']\n", ("line 1",)),
        ("", ("no sections",)),
        ("- a\n", ("no sections",)),
    ],
)
def test_a_file_that_is_no_design_is_refused_by_line(edit, tmp_path, text, parts):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError) as error:
        params.load()
    refused(str(error.value), "params.yaml", *parts)
    assert not (tmp_path / "hacked").exists()


def test_1e_3_is_a_number_as_it_is_for_dvc(edit, tmp_path):
    (tmp_path / "params.yaml").write_text(
        TEXT.replace("weight_decay: 1.0e-5", "weight_decay: 1e-5"), encoding="utf-8"
    )
    assert "weight_decay: 1e-5" in (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert params.settings("laptop", "pretrain")["weight_decay"] == 1e-5


def test_a_reader_cannot_spoil_the_design_for_the_next(edit):
    edit()
    params.load()["data"]["base"]["books"].append(1)
    params.rows("laptop", "ablations")["loss"]["rows"].clear()
    assert (
        1 not in params.load()["data"]["base"]["books"]
        and params.rows("laptop", "ablations")["loss"]["rows"]
    )


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: params.settings("labtop", "model"), ("unknown profile 'labtop'", "laptop")),
        (lambda: params.settings("laptop", "finetune", "olp"), ("'olp'", "did you mean 'opl'")),
        (lambda: params.settings("laptop", "finetune", "mixed_8k"), ("retrievers", "'mixed_8k'")),
        (lambda: params.home("tiny"), ("unknown profile 'tiny'", "smoke")),
    ],
)
def test_a_wrong_question_is_refused_by_name(edit, call, parts):
    edit()
    with pytest.raises(ParamsError) as error:
        call()
    refused(str(error.value), *parts)


def test_reading_the_design_costs_no_torch():
    code = (
        "import sys; from lib.pipeline import params; params.load(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_published_row_is_evaluated_like_any_other(house_of):
    """Added to the committed file as its comment says."""
    house_of(
        {
            "published: &published {}": "published: &published\n"
            "  theirs: {checkpoint: hazyresearch/x, max_length: 2048}"
        }
    )
    assert params.rows("laptop", "published") == {
        "theirs": {"checkpoint": "hazyresearch/x", "max_length": 2048}
    }
    assert [*params.rows("laptop", "evaluated")] == [*params.rows("laptop", "retrievers"), "theirs"]
    for profile in ("smoke", "study", "real"):  # half a GB is no smoke test
        assert "theirs" not in params.rows(profile, "evaluated")
    with pytest.raises(ParamsError, match="unknown row 'theirs'"):
        params.paper_length("theirs")


@pytest.fixture
def house_of(tmp_path, monkeypatch):
    """house_of({old: new}): a working directory with the committed params.yaml, old → new."""

    def build(changes):
        text = (ROOT / "params.yaml").read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        (tmp_path / "dvc.yaml").write_text("stages: {}\n")
        monkeypatch.chdir(tmp_path)

    return build
