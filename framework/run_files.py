"""The names of files in a run folder."""

LEDGER = "ledger.json"
MERGED = "merged.safetensors"  # of a merger
METRICS = "metrics.jsonl"
PROVENANCE = "provenance.json"
RESOLVED = "resolved.yaml"
RESULT = "result.json"  # of a run without training
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
