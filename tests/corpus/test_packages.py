"""What is installed is read as text: nothing runs or comes twice, no order of files matters."""

import gc
import importlib
import re
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.corpus import packages
from lib.corpus.packages import (
    Item,
    Module,
    Shingles,
    as_item,
    assign,
    distinct,
    normal,
    parse,
    read,
    repeated,
)
from lib.pipeline.errors import CorpusError

ROOT = Path(__file__).parents[2]


def prose(topic: str, words: int = 60) -> str:
    """Words that no other topic has."""
    return " ".join(f"{topic}{i}" for i in range(words))


def source(topic: str, functions: int = 8) -> str:
    """A documented module, long enough to be read."""
    parts = [f'"""All that is known about {topic}.\n\n{prose(topic)}\n"""\n']
    for i in range(functions):
        parts.append(
            f'def find_{topic}_{i}(x):\n    """Finds {topic} number {i} in a heap.\n\n'
            f'    {prose(f"{topic}{i}_")}\n    """\n    return "{topic}", x + {i}\n'
        )
    return "\n\n".join(parts)


def module(name: str, *bodies: str, unit: str = "owls", code: str = "") -> Module:
    return Module(
        "owls",
        name,
        unit,
        [
            Item(name, f"{name}.f{i}", f"Item {i} of module {name}.", body)
            for i, body in enumerate(bodies)
        ],
        code,
        [],
    )


def items(text: str) -> dict[str, Item]:
    """{name within the module: item} of a file owls/sight.py."""
    return {
        item.name.removeprefix("owls.sight").lstrip("."): item
        for item in parse("owls", PurePosixPath("owls/sight.py"), text).items
    }


def code(text: str) -> str:
    return parse("owls", PurePosixPath("owls/sight.py"), text).code


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install("owls", {"owls/sight.py": text}): a package as pip leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(
        package: str, files: dict[str, str | bytes], version: str = "1.0", readme: str = "Owls see."
    ) -> Path:
        about = tmp_path / f"{package}-{version}.dist-info"
        about.mkdir()
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n\n{readme}"
        )
        (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))
        importlib.invalidate_caches()
        return tmp_path

    return installed


def names(library: packages.Library) -> list[str]:
    return [module.name for module in library.modules]


# ---------------------------------------------------------------- files


def test_files_are_read_and_never_run(install):
    trap = (
        source("owl")
        + '\nfrom pathlib import Path\nPath(__file__).with_name("ran").touch()\n'
        + 'raise SystemExit("imported")\n'
    )
    folder = install(
        "owls",
        {
            "owls/__init__.py": trap,
            "owls/sight.py": trap,
            "owls/night/__init__.py": trap.replace("owl", "moth"),
        },
    )
    library = read(["owls"], 10)
    assert names(library) == ["owls.night", "owls.sight"]
    assert [item.name for item in library.modules[1].items] == ["owls.sight"] + [
        f"owls.sight.find_owl_{i}" for i in range(8)
    ]
    assert (
        not list(folder.rglob("ran"))
        and not list(folder.rglob("*.pyc"))
        and "owls" not in sys.modules
    )


@pytest.mark.parametrize(
    "path",
    [
        "tests/eyes.py",
        "test/eyes.py",
        "_testing/eyes.py",
        "far/tests/deep/eyes.py",
        "test_eyes.py",
        "eyes_test.py",
        "conftest.py",
        "_vendor/eyes.py",
        "vendored/eyes.py",
        "_vendored_lib/eyes.py",
        "extern/eyes.py",
        "externals/eyes.py",
        "third_party/eyes.py",
        "_generated/eyes.py",
        "distutils/eyes.py",
        "eyes_pb2.py",
        "version.py",
        "_version_meson.py",
        "__config__.py",
        "_distributor_init_local.py",
        "__init__.py",
        "eyes.pyi",
    ],
)
def test_tests_and_other_peoples_code_and_what_differs_between_wheels_are_left_out(install, path):
    """numpy.distutils is in the wheels for Python 3.11 and in no later ones."""
    install("owls", {"owls/sight.py": source("owl"), f"owls/{path}": source("hen")})
    assert names(read(["owls"], 10)) == ["owls.sight"]


@pytest.mark.parametrize(
    "path",
    [
        "latest/eyes.py",
        "contest.py",
        "testimony.py",
        "externalities.py",
        "far/__init__.py",
        "conversion.py",
    ],
)
def test_a_name_that_only_looks_like_a_test_stays(install, path):
    install("owls", {"owls/sight.py": source("owl"), f"owls/{path}": source("hen")})
    assert len(names(read(["owls"], 10))) == 2


@pytest.mark.parametrize(
    "text",
    [
        "# This file is auto-generated.\n" + source("hen"),
        '"""Automatically generated by hens."""\n' + source("hen"),
        "# DO NOT EDIT\n" + source("hen"),
        source("hen", functions=1),
        source("hen", functions=2_000),
        "x = 1\n" * 2_000,
    ],
    ids=[
        "auto-generated",
        "generated by",
        "do not edit",
        "below 3 kB",
        "beyond 1 MB",
        "no docstrings",
    ],
)
def test_generated_tiny_giant_and_undocumented_files_are_left_out(install, text):
    install("owls", {"owls/sight.py": source("owl"), "owls/hen.py": text})
    assert names(read(["owls"], 10)) == ["owls.sight"]


def test_files_outside_the_package_are_left_out(install):
    """A script beside site-packages, a module without a folder, a wheel's data."""
    folder = install(
        "owls",
        {
            "owls/sight.py": source("owl"),
            "owl.py": source("hen"),
            "owls-1.0.data/scripts/eyes.py": source("fox"),
        },
    )
    (folder / "owls-1.0.dist-info" / "RECORD").open("a").write("../../bin/eyes.py,,\n")
    assert names(read(["owls"], 10)) == ["owls.sight"]


@pytest.mark.parametrize(
    "raw",
    [
        '"""Sch\xf6n."""\n'.encode("latin-1") + source("hen").encode(),
        b"# -*- coding: latin-1 -*-\n# \xe9\n" + source("hen").encode(),
        source("hen").encode("utf-16"),
        source("hen").encode() + b"\0",
        source("hen").encode() + b"def (:\n",
        source("hen").encode() + b'"""open',
        source("hen").encode() + b"print 'Python 2'\n",
        source("hen").encode() + b"x = " + b"(" * 500 + b")" * 500,
        source("hen").encode() + b"x = " + b"-" * 20_000 + b"1",
        source("hen").encode() + b"x" + b".a" * 8_000,
    ],
    ids=[
        "latin-1",
        "declared latin-1",
        "utf-16",
        "nul",
        "syntax",
        "open quotes",
        "python 2",
        "nested too deep",
        "a long sign",
        "a long chain",
    ],
)
def test_a_file_that_is_no_python_does_not_stop_the_reading(install, raw):
    install("owls", {"owls/a.py": raw, "owls/sight.py": source("owl")})
    assert names(read(["owls"], 10)) == ["owls.sight"]


def test_a_thousand_branches_do_not_stop_the_reading():
    """Each elif lies inside the one before."""
    text = '"""All that is known about owls."""\nif x == 0:\n    pass\n' + "".join(
        f"elif x == {i}:\n    pass\n" for i in range(1, 1200)
    )
    found = parse("owls", PurePosixPath("owls/sight.py"), text)
    assert found is None or [item.name for item in found.items] == ["owls.sight"]


def test_line_ends_and_a_byte_order_mark_make_no_difference(install):
    text = "# Owls see.\n" + source("owl")
    install(
        "owls",
        {
            "owls/a.py": text,
            "owls/b.py": text.replace("\n", "\r\n"),
            "owls/c.py": text.replace("\n", "\r"),
            "owls/d.py": "\ufeff" + text,
        },
    )
    first, *others = read(["owls"], 10).modules
    for other in others:
        assert (other.code, other.comments) == (first.code, first.comments)
        assert [item[2:] for item in other.items] == [item[2:] for item in first.items]


def test_absent_packages_are_named_and_the_others_have_version_and_readme(install):
    install(
        "owls",
        {"owls/sight.py": source("owl")},
        version="2.13.0+cpu",
        readme="Owls see.\n\nAt night.",
    )
    library = read(["no-such-hens", "owls", "no-such-foxes"], 10)
    assert library.absent == ["no-such-foxes", "no-such-hens"]
    assert library.versions == {"owls": "2.13.0"} and library.readmes == {
        "owls": "Owls see.\n\nAt night."
    }


def test_a_file_that_is_gone_is_named_with_its_package(install):
    folder = install("owls", {"owls/sight.py": source("owl")}, version="1.5")
    (folder / "owls" / "sight.py").unlink()
    with pytest.raises(
        CorpusError, match=r"^owls/sight.py of owls cannot be read .*pip install .*owls==1\.5$"
    ):
        read(["owls"], 10)
    assert gc.isenabled()


def test_the_order_of_packages_and_of_their_files_decides_nothing(install):
    files = {f"owls/{name}.py": source(name) for name in "fghijklmno"}
    install("owls", files)
    install("moths", {"moths/wing.py": source("wing")})
    ahead = read(["owls", "moths"], 4)
    (next(Path(sys.path[0]).glob("owls*.dist-info")) / "RECORD").write_text(
        "".join(f"{name},,\n" for name in reversed(files))
    )
    assert read(("moths", "owls"), 4) == ahead
    assert names(ahead) == sorted(names(ahead)) and len(ahead.modules) == 5
    assert set(names(ahead)) < set(
        names(read(["owls", "moths"], 5))
    )  # a larger draw holds the smaller one


def test_the_collector_is_left_as_it_was(install):
    install("owls", {"owls/sight.py": source("owl")})
    read(["owls"], 10)
    assert gc.isenabled()
    gc.disable()
    try:
        read(["owls"], 10)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_every_package_of_the_allow_list_is_locked_to_one_version_on_every_machine():
    """A second version for another Python, or a marker of a platform, is another text there."""
    lock = re.findall(
        r"(?m)^([a-z0-9-]+)==\S+ *(;[^\\\n]*)?", (ROOT / "requirements.lock").read_text()
    )
    once = [name for name, marker in lock if not marker] + re.findall(
        r'"(torch)==', (ROOT / "pyproject.toml").read_text()
    )
    assert len(set(packages.PACKAGES)) == len(packages.PACKAGES)
    assert [name for name in packages.PACKAGES if once.count(name) != 1] == []


# ---------------------------------------------------------------- one file

SIGHT = '''"""All that is known about owls.

They see at night.
"""
# owls turn their heads further than hens do,
# and they do it without a sound, at night


def look(x):
    r"""Looks at the thing that is there."""
    if x:
        """A string that documents nothing."""
    def inner():
        """Looks inside of the thing there."""
    return x


async def wait():
    """Waits until the night has come."""


def _turn():
    """Turns the head without a sound."""


class Owl:
    """A bird that sees at night."""

    def hunt(self):
        """Hunts for what moves in grass."""

    class Eye:
        """What an owl sees at night with."""

        def blink(self):
            """Closes the eye and opens it."""

    def _rest(self):
        """Rests for all of the day."""


class _Moth:
    """A thing that an owl eats."""

    def fly(self):
        """Flies to where the light is."""


if night:
    def hoot():
        """Hoots when the night has come."""
else:
    try:
        def sleep():
            """Sleeps when the day has come."""
    finally:
        pass
add_newdoc("owls.wing", "feather", """Makes no sound in any air.""")
add_newdoc("owls.wing", "Wing", ("beat", """Beats the air without a sound."""))
add_docstr(owls.claw.grip, r"""Grips what the eyes have found.

{more}
""".format(more=1))
add_newdoc(what, ever(), """Not a name, so no item.""")
'''


def test_public_things_are_items_in_their_order_and_private_ones_are_not():
    found = items(SIGHT)
    assert list(found) == [
        "",
        "look",
        "wait",
        "Owl",
        "Owl.hunt",
        "Owl.Eye",
        "Owl.Eye.blink",
        "hoot",
        "sleep",
        "owls.wing.feather",
        "owls.wing.Wing.beat",
        "owls.claw.grip",
    ]
    assert found[""] == Item(
        "owls.sight", "owls.sight", "All that is known about owls.", "They see at night."
    )
    assert found["Owl.hunt"] == Item(
        "owls.sight", "owls.sight.Owl.hunt", "Hunts for what moves in grass.", ""
    )
    assert found["owls.claw.grip"].summary == "Grips what the eyes have found."


def test_a_documented_name_is_a_dotted_name():
    """numpy.typing documents what a name stands for: add_newdoc(name, value, text)."""
    assert list(
        items('add_newdoc("owls.Like", "Union[owls, ...]", """Looks like an owl at night.""")\n')
    ) in ([], ["owls.Like"])


def test_code_is_the_source_without_docstrings():
    assert (
        code(SIGHT).startswith("# owls turn") and code(SIGHT).count('"""') == 4
    )  # a string in an if, and a call that documents nothing
    for item in items(SIGHT).values():
        assert item.summary not in code(SIGHT)
    assert code(SIGHT).split("\n\n")[1:4] == [
        "def look(x):",
        '    if x:\n        """A string that documents nothing."""\n    def inner():',
        "    return x",
    ]
    assert "\n\n\n" not in code(SIGHT)


def test_code_beside_a_docstring_on_one_line_stays():
    assert "import moths" in code('"""All that is known about owls."""; import moths\n')
    assert "def look(x):" in code('def look(x): "Looks at the thing that is there."\nx = 1\n')


def test_comments_are_blocks_that_read_like_prose():
    found = parse(
        "owls",
        PurePosixPath("owls/sight.py"),
        SIGHT
        + f"x = 1  # {prose('short')}\n# {prose('alone')}\nx\n"
        + f"# Copyright of {prose('hen')}\n# by hens\n",
    )
    assert found.comments == [
        "owls turn their heads further than hens do, and they do it without a sound, at night"
    ]


@pytest.mark.parametrize(
    "path, name, unit",
    [
        ("owls/sight.py", "owls.sight", "owls"),
        ("owls/night/__init__.py", "owls.night", "owls.night"),
        ("owls/night/eyes/far.py", "owls.night.eyes.far", "owls.night.eyes"),
        ("owls/night/eyes/far/off/moon.py", "owls.night.eyes.far.off.moon", "owls.night.eyes"),
    ],
)
def test_a_unit_is_package_and_sub_package(path, name, unit):
    found = parse("owls", PurePosixPath(path), SIGHT)
    assert (found.package, found.name, found.unit) == ("owls", name, unit)


# ---------------------------------------------------------------- one docstring


def split(doc: str, name: str = "owls.look") -> tuple[str, str]:
    item = as_item("owls", name, doc)
    return item.summary, item.body


@pytest.mark.parametrize(
    "doc, summary, body",
    [
        ("Looks at the thing there.", "Looks at the thing there.", ""),
        (
            "Looks at\n    the thing there.\n\n    And then\n      indented.\n    ",
            "Looks at the thing there.",
            "And then\n  indented.",
        ),
        ("\n    Looks at the thing there.\n\n    More.", "Looks at the thing there.", "More."),
        (
            "look(x, dtype=None)\n\nLooks at the thing there.\n\nParameters\n----------\nx : thing",
            "Looks at the thing there.",
            "look(x, dtype=None)\nParameters\n----------\nx : thing",
        ),
        (
            "look(x,\n     y) -> thing\n\nLooks at the thing there.",
            "Looks at the thing there.",
            "look(x,\n     y) -> thing",
        ),
        ("owls.look(x)\nLooks at the thing there.", "Looks at the thing there.", "owls.look(x)"),
        (
            "hear(x)\n\nLooks at the thing there.",
            "",
            "hear(x)\n\nLooks at the thing there.",
        ),  # another's signature
        ("look(x)", "", "look(x)"),
        ("Looks.\n\nMore.", "", "Looks.\n\nMore."),  # three words or fewer ask for nothing
        ("Four words are enough.", "Four words are enough.", ""),
        (" ".join(["word"] * 40), " ".join(["word"] * 40), ""),
        (" ".join(["word"] * 41), "", " ".join(["word"] * 41)),
        (
            "Looks at the thing over there. Then " + " ".join(["word"] * 40) + "\n\nMore.",
            "Looks at the thing over there.",
            "Then " + " ".join(["word"] * 40) + "\n\nMore.",
        ),
        (
            "Looking at owls\n===============\n\nMore of it.",
            "",
            "Looking at owls\n===============\n\nMore of it.",
        ),
        (">>> look(x) == x and y", "", ">>> look(x) == x and y"),
        (".. deprecated:: 1.0 of all owls", "", ".. deprecated:: 1.0 of all owls"),
        (":param x: the thing there", "", ":param x: the thing there"),
        ("x : the thing that is there", "", "x : the thing that is there"),
        ("Returns the thing that is there.", "Returns the thing that is there.", ""),
        (
            "See :class:`~owls.Eye` and :func:`the hunt <owls.hunt>` of ``night``.",
            "See owls.Eye and the hunt of night.",
            "",
        ),
        ("Looks at \ud800 the thing.", "Looks at ? the thing.", ""),
    ],
)
def test_summary_and_body(doc, summary, body):
    assert split(doc) == (summary, body)


@pytest.mark.parametrize(
    "doc",
    [
        "Parameters\n----------\nx : thing or array of things",
        "Returns\n-------\nthing\n    The one that was there.",
        "Args:\n    x: the thing to be looked at",
        "Looking at owls\n===============\nThey see at night.",
    ],
)
def test_a_heading_with_its_text_right_below_is_no_summary(doc):
    assert split(doc)[0] == ""


def test_a_docstring_of_nothing_is_no_item():
    assert (
        as_item("owls", "owls.look", "") is None and as_item("owls", "owls.look", " \n\n ") is None
    )


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("look(x) Owl.\n\t`:->=é\ud800"), max_size=120))
def test_no_word_of_a_docstring_is_lost(doc):
    item = as_item("owls", "owls.look", doc)
    text = f"{item.summary} {item.body}" if item else ""
    assert sorted(packages.clean(doc).split()) == sorted(text.split())
    (item.text() if item else "").encode()  # whatever comes out can be written


def test_an_items_text_is_its_lines_with_or_without_the_summary():
    item = Item("owls", "owls.look", "Looks at it.", "More.")
    assert (
        item.text() == "owls.look\nLooks at it.\nMore."
        and item.text(summary=False) == "owls.look\nMore."
    )
    assert item._replace(body="").text() == "owls.look\nLooks at it."


# ---------------------------------------------------------------- duplicates


def test_normal_by_hand():
    assert (
        normal("The OWL's  eyes\n(two, 2nd) see_far—ÉTÉ!") == "the owl s eyes two 2nd see far été"
    )
    assert normal(" .,;\n_ ") == normal("") == ""
    assert normal(normal("Re-read: THIS")) == normal("Re-read: THIS")


def test_shingles_by_hand():
    shingles = Shingles(size=3)
    one, two = shingles.of("a b c d"), shingles.of("b c d e")  # abc bcd | bcd cde
    assert len(one) == len(two) == 2 and len(np.intersect1d(one, two)) == 1
    assert len(np.intersect1d(one, shingles.of("c b a d c b"))) == 0  # order counts
    assert len(shingles.of("a b a b a b a")) == 2  # each run once
    assert len(shingles.of("a b")) == len(shingles.of("")) == 0
    assert len(Shingles().of("a b c d e f g h i")) == 2  # eight words a run


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=2, max_size=2),
    st.integers(1, 4),
)
def test_shingles_equal_sets_of_runs(texts, size):
    runs = [{tuple(words[i : i + size]) for i in range(len(words) - size + 1)} for words in texts]
    shingles = Shingles(size)
    codes = [shingles.of(" ".join(words)) for words in texts]
    assert [len(code) for code in codes] == [len(set_of) for set_of in runs]
    assert len(np.intersect1d(*codes)) == len(runs[0] & runs[1])


def test_repeated_by_hand():
    """Sixteen words hold nine runs of eight; twelve shared words hold five of them, eleven four."""
    text = prose("owl", 16)
    five, four = (" ".join([*text.split()[:n], *prose("hen", 16 - n).split()]) for n in (12, 11))
    assert repeated([text, five, four, text]).tolist() == [False, True, False, True]
    assert repeated(
        [prose("owl", 17), " ".join([*prose("owl", 12).split(), *prose("hen", 5).split()])]
    ).tolist() == [False, False]  # five of ten
    assert repeated([five, text]).tolist() == [False, True]  # the first stays, whichever it is
    assert repeated(["Red fox.", "red, FOX", "red foxes", ""]).tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert repeated([f"{prose('fox', 8)} {prose('fox', 8)}"]).tolist() == [
        False
    ]  # a text is no copy of itself
    assert repeated([]).tolist() == []


def test_near_duplicates_leave_and_the_first_stays():
    near = " ".join([*prose("owl").split()[:40], *prose("hen", 20).split()])
    modules = [
        module("owls.a", prose("owl"), prose("fox")),
        module("owls.b", near, prose("moth")),
        module("owls.c", prose("owl")),
    ]
    first, second = distinct(modules)  # owls.c is left with nothing
    assert first == modules[0]
    assert [item.name for item in second.items] == ["owls.b.f1"]


def test_a_summary_alone_does_not_make_a_duplicate():
    """Two items may begin alike and go on differently."""
    a, b = (
        Item("owls", f"owls.{name}", "Looks at the thing over there.", prose(name))
        for name in ("owl", "hen")
    )
    assert distinct([Module("owls", "owls", "owls", [a, b], "", [])])[0].items == [a, b]


def test_code_that_is_nearly_anothers_is_left_out_and_its_items_stay():
    line = "x_{} = look_at_the_thing({})"

    def code(numbers) -> str:
        return "\n".join(line.format(i, i) for i in numbers)

    modules = [
        module(f"owls.{name}", prose(name), code=code(numbers))
        for name, numbers in (("a", range(10)), ("b", range(4, 14)), ("c", range(5, 23)))
    ]
    assert [found.code for found in distinct(modules)] == [
        modules[0].code,
        "",
        modules[2].code,
    ]  # 6 of 10, then 9 of 18 known
    assert len(distinct(modules)) == 3


# ---------------------------------------------------------------- splits

units = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(sizes=units, data=st.data())
def test_every_unit_lies_whole_in_one_split_whatever_the_order(sizes, data):
    modules = [
        module(f"owls.{unit}{i}", "x" * size, unit=unit)
        for unit, some in sizes.items()
        for i, size in enumerate(some)
    ]
    split_of = assign(modules)
    assert split_of.keys() == sizes.keys() and set(split_of.values()) <= {
        "train",
        "validation",
        "test",
    }
    assert assign(data.draw(st.permutations(modules))) == split_of
    text = {
        unit: sum(
            len(item.summary) + len(item.body)
            for found in modules
            if found.unit == unit
            for item in found.items
        )
        for unit in sizes
    }
    for name, share in packages.SHARES.items():
        held = [text[unit] for unit in sizes if split_of[unit] == name]
        assert sum(held) <= share * sum(text.values()) and all(
            size <= share * sum(text.values()) / 3 for size in held
        )


def test_many_units_fill_the_splits_and_a_giant_is_for_training():
    """100 equal units and one of their size together: 13 % of the text are 26 units, 4 % are 8."""
    modules = [module(f"owls.{i:03}", "x" * 400, unit=f"owls.{i:03}") for i in range(100)]
    one = len(modules[0].items[0].summary) + 400
    giant = module(
        "moths.all", "x" * (100 * one - len("Item 0 of module moths.all.")), unit="moths"
    )
    counts = [
        list(assign([*modules, giant]).values()).count(split)
        for split in ("test", "validation", "train")
    ]
    assert counts == [26, 8, 67]
    assert assign([*modules, giant])["moths"] == "train"
