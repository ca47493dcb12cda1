"""The report of a suite: one document of all figures, and the Markdown and HTML pages made from it."""

from pathlib import Path
from typing import Any

from v2flow.benchmark.html import html_report
from v2flow.benchmark.plan import Plan
from v2flow.benchmark.suite import Suite
from v2flow.benchmark.tables import markdown_report
from v2flow.data.attribution import report_attribution
from v2flow.metrics.files import write_json


def suite_document(suite: Suite, plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What `results.json` holds: the suite, what its rows cost, their results, and the rows that are still to run."""
    done = {(result["name"], result["seed"]) for result in results}
    return {
        "suite": {
            "name": suite.name,
            "title": suite.title,
            "about": suite.about.strip(),
            "file": suite.file,
            "minutes": suite.minutes,
            "threads": suite.threads,
            "seeds": suite.seeds,
            "reference": suite.reference,
            "attribution": report_attribution(suite.evaluate.data),
        },
        "overhead": plan.overhead,
        "rows": results,
        "pending": [
            [row.name, seed] for seed in suite.seeds for row in plan.rows if (row.name, seed) not in done
        ],
    }


def write_report(suite: Suite, plan: Plan, results: list[dict[str, Any]], out: Path) -> None:
    """Writes `results.json`, `README.md` and `report.html` into `out`."""
    document = suite_document(suite, plan, results)
    write_json(out / "results.json", document)
    (out / "README.md").write_text(markdown_report(document))
    (out / "report.html").write_text(html_report(document, out))
