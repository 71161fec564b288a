"""The cache can be looked at and cleared; clearing costs time only."""

import pytest
from conftest import paint
from rows import untouched

from vitft import afar, cache, io, store
from vitft.errors import RecipeError
from vitft.run import run


def test_it_tells_what_it_holds_and_clears_it(tiny_recipe, capsys):
    run(tiny_recipe("probe"))
    assert cache.main(["info"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "60 rows" in out[0]
    assert "vitflower_ti16" in out[0]
    assert "plain [32, 32]" in out[0]
    assert out[1].startswith("1 spaces, ")
    assert "which files decode" in out[2]
    assert all("fingerprints" in line for line in out[3:])
    assert cache.main(["clear"]) == 0
    assert "MB freed" in capsys.readouterr().out
    assert store.spaces() == ()
    assert run(tiny_recipe("probe")).scores.n == 9


def test_pieces_of_files_on_servers_are_told_and_cleared_and_what_is_known_stays(capsys):
    afar.keep("0-0", 2_000_000, lambda: [bytes(2_000_000)]).close()
    io.write_bytes(io.cache_dir() / "afar" / "host-0" / "a.tar", bytes(1_000_000))
    assert cache.main(["info"]) == 0
    _, pieces, known = capsys.readouterr().out.splitlines()
    assert pieces.startswith("2.0 MB of files on servers in ")
    assert known.startswith("1.0 MB, what is known of files on servers, in ")
    assert cache.main(["clear"]) == 0
    assert capsys.readouterr().out == "2.0 MB freed\n"
    assert cache.main(["info"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "0 spaces",
        "1.0 MB",
    ]


def test_an_empty_cache_is_no_fault(capsys):
    assert cache.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("0 spaces, 0.0 MB in ")
    assert cache.main(["clear"]) == 0


def test_clearing_removes_nothing_that_is_not_the_caches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path))
    photo = paint(tmp_path / "features" / "roses" / "a.jpg", (200, 40, 40))
    space = tmp_path / "features" / ("0" * 32)
    space.mkdir()
    (space / "about.json").write_text('{"transform": "[[", "backbone": 3}')
    assert cache.main(["info"]) == 0
    assert "unknown ?" in capsys.readouterr().out
    assert cache.main(["clear"]) == 0
    assert photo.exists()
    assert not space.exists()


def test_the_cache_is_never_below_the_data(tiny_recipe, tiny_photos, monkeypatch):
    monkeypatch.setenv("VITFT_CACHE", str(tiny_photos / "red" / ".cache"))
    with untouched(tiny_photos), pytest.raises(RecipeError) as caught:
        run(tiny_recipe("probe"))
    assert "cli.out_in_data" in str(caught.value)
    assert "\nfix: set VITFT_CACHE" in str(caught.value)
