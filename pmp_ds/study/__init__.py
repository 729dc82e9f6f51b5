"""The report of a study: results.jsonl to tables, pictures, effect sizes and a verdict."""
