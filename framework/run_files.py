"""The names of files and folders that lightspan writes: in a run folder, if nothing else is said."""

CHECKPOINTS = "checkpoints"  # a folder
CURVE = "curve.png"  # of a search for the intrinsic dimension
EXPORT = "export.json"  # in an export; distinguishes a folder that an export may replace from one that it must not
FAILED = "failed.txt"  # why a fit that ended in an error did so; gone when it is started again
LEDGER = "ledger.json"
LOCK = ".lightspan.lock"
MERGED = "merged.safetensors"  # of a merger
MERGED_FOLDER = "merged"  # of a merger whose leading checkpoint is a Hugging Face folder
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"  # of an export or a merge, and of Hugging Face's folders
OUTPUT = "output.txt"  # what a run that another command started has printed
PICTURE = "picture.png"  # of a run without training, like TABLE and TENSORS
PLAN = "plan.json"
PREDICTIONS = "predictions.pt"
PROVENANCE = "provenance.json"
REFERENCES = "references.json"  # of a search for the intrinsic dimension
REPORT = "report.html"  # in the folder of a report
RESOLVED = "resolved.yaml"
RESULT = "result.json"  # of a run without training
SAMPLES = "samples.jsonl"
SUBSPACE = "subspace.safetensors"  # the numbers that IntrinsicDimension trained
SUMMARY = "summary.json"
TABLE = "table.csv"
TENSORS = "result.safetensors"
TRACE = "trace"  # a folder of a proof
