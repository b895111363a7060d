"""Whole, or as it was before: whatever fails, and wherever."""

import errno
import itertools
import os
import stat

import pytest

from lib.pipeline import files


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def failing(call, error, after=0):
    """The call, but one raises: the first, or the one after so many."""
    count = itertools.count()

    def instead(*args, **options):
        if next(count) == after:
            raise error
        return call(*args, **options)

    return instead


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=["full", "interrupted"])
@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, name, error):
    path = tmp_path / "a.txt"
    files.write(path, "old")
    monkeypatch.setattr(os, name, failing(getattr(os, name), error))
    with pytest.raises(
        type(error), match="No space left.*a.txt" if isinstance(error, OSError) else None
    ):
        files.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is_with_missing_folders_and_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write(tmp_path / "b" / "c.txt", "é\n")
        with files.replacing(tmp_path / "d" / "e") as draft:
            (draft / "f").write_text("")
    finally:
        os.umask(mask)
    assert (tmp_path / "b" / "c.txt").read_bytes() == b"\xc3\xa9\n"
    assert stat.S_IMODE((tmp_path / "b" / "c.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d" / "e").stat().st_mode) == 0o750


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with files.replacing(tmp_path / "folder") as draft:
            (draft / name).write_text(name)
            assert draft.parent == tmp_path  # a rename away, on the same disk
    assert contents(tmp_path) == {"folder/new": b"new"}


@pytest.mark.parametrize("error", FAILURES, ids=["full", "interrupted"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_replacement_leaves_what_was_there(tmp_path, monkeypatch, error, there):
    """The block fails, then every system call in turn, until there are no more."""
    if there:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(type(error)), files.replacing(tmp_path / "folder") as draft:
        (draft / "new").write_text("new")
        raise error
    assert contents(tmp_path) == before
    for name in ("fsync", "rename", "chmod"):
        for after in range(9):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing(getattr(os, name), error, after))
                try:
                    with files.replacing(tmp_path / "folder") as draft:
                        (draft / "new").write_text("new")
                    break
                except type(error):
                    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == there
        assert (
            contents(tmp_path) == {"folder/new": b"new"}
            and after == (there if name == "rename" else 0) + 1
        )
        (tmp_path / "folder" / "new").unlink()
        (tmp_path / "folder").rmdir()
        if there:
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "old").write_text("old")


def test_a_link_or_file_in_a_folders_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("old")
    for name in ("link", "file"):
        with files.replacing(tmp_path / name) as draft:
            (draft / "a").write_text("new")
        assert (tmp_path / name / "a").read_text() == "new" and not (tmp_path / name).is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file", "link"]


def test_an_error_about_another_file_stays_about_that_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), files.replacing_file(tmp_path / "a"):
        open(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_equal_files_have_equal_sums(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        files.sha256(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize(
    "name",
    [
        "qmsum",
        "BeIR/scifact",
        "../../../../escaped/x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a b",
        "日本語",
        "x" * 400,
        "\ud800",
        "nul\x00",
        "C:\\x",
        "a%2Fb",
    ],
)
def test_any_name_is_one_component_of_a_path(tmp_path, name):
    encoded = files.encoded(name)
    assert (
        (tmp_path / f"{encoded}.trec").parent == tmp_path
        and "/" not in encoded
        and encoded.strip(".")
    )
    files.write(tmp_path / f"{encoded}.trec", "")
    assert [path.name for path in tmp_path.iterdir()] == [f"{encoded}.trec"]


def test_other_names_give_other_files_and_plain_ones_stay():
    names = ["a/b", "a%2Fb", "a b", "a+b", "x" * 400, "x" * 401, "..", ".", ""]
    assert len({files.encoded(name) for name in names}) == len(names)
    assert (
        files.encoded("courtlistener_Plain_Text") == "courtlistener_Plain_Text"
        and files.encoded("book_512_deep") == "book_512_deep"
    )
