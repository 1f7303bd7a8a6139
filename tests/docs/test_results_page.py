"""docs/results.md has the tables that the benchmarks' results make."""

from testbed.run import python
from tests.docs.pages import ROOT


def test_the_page_of_results_is_current() -> None:
    """By the command, for tests import no benchmark."""
    python("-m", "benchmarks.recipe_page", "--check", env={"PYTHONPATH": str(ROOT)}).ok()
