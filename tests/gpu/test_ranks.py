"""Two processes with a GPU each (they share it if there is one) prune a model together by NCCL, beside one alone."""

import shutil

import pytest
from rank_process import CASES, alone, assert_close, assert_same, start


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_llama):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(tiny_llama, folder / "dense")
    return start(folder, "nccl")


@pytest.mark.parametrize("case", CASES)
def test_both_end_with_the_model_of_one(case, together):
    assert_same([found[case] for found in together])
    assert_close(together[0][case], alone(case, "cuda"))


@pytest.mark.parametrize("case", ["on load", "to disk"])
def test_both_have_one_checkpoint(case, together):
    assert_same([found[case] for found in together])


@pytest.mark.parametrize(
    ("failure", "message"),
    [("solve", "no solution here"), ("memory", "cannot go on with fewer"), ("config", "have different config")],
)
def test_a_failure_ends_both(failure, message, together):
    assert all(message in found[failure] for found in together)
