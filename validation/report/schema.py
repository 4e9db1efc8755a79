"""The JSON Schema of report.json, made from the model: `python -m validation.report.schema --write`.

`schema.json` beside this file is its published copy; a test holds the two equal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from validation.report.model import SCHEMA_VERSION, Report

PUBLISHED = Path(__file__).with_name("schema.json")


def schema_text() -> str:
    """JSON Schema (draft 2020-12) of report.json as this release writes it; ends in a newline."""
    schema = Report.model_json_schema(mode="serialization")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"Validation report, schema version {SCHEMA_VERSION}.",
    }
    return json.dumps(head | schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PUBLISHED.write_text(schema_text(), encoding="utf-8")
    else:
        sys.stdout.write(schema_text())
