"""The cache can be looked at and cleared; clearing costs time only."""

from vitft import cache, store
from vitft.run import run


def test_it_tells_what_it_holds_and_clears_it(tiny_recipe, capsys):
    run(tiny_recipe("probe"))
    assert cache.main(["info"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "60 rows" in out[0]
    assert "vitflower_ti16" in out[0]
    assert "plain [32, 32]" in out[0]
    assert out[-1].startswith("1 spaces, ")
    assert cache.main(["clear"]) == 0
    assert "MB freed" in capsys.readouterr().out
    assert store.spaces() == ()
    assert run(tiny_recipe("probe")).scores.n == 9


def test_an_empty_cache_is_no_fault(capsys):
    assert cache.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("0 spaces, 0.0 MB in ")
    assert cache.main(["clear"]) == 0
