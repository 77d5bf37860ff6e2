"""What the files of a run folder are called."""

LEDGER = "ledger.json"
MERGED = "merged.safetensors"  # of a merger
METRICS = "metrics.jsonl"
PROVENANCE = "provenance.json"
RESOLVED = "resolved.yaml"
RESULT = "result.json"  # of a run that trains nothing
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
