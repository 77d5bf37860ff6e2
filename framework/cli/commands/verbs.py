"""The table of verbs, in the order in which `lightspan --help` lists them. A new verb is a row here and a module."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: one word, or two where a verb has several forms: of `runs` and `runs clean` the longer one is meant.
        help: what it does, for the list of verbs and its own page of help.
        examples: two command lines that its help ends with.
        module: of `lightspan.cli.commands`: where its `add_arguments` and the function that runs it are.
        run: the name of that function.
        flags: whether it takes flags (`key.path=value`) anywhere on the line.
        only_prints: whether it only prints, so that a reader such as `head` may close the pipe early.
    """

    name: str
    help: str
    examples: tuple[str, str]
    module: str
    run: str = "run"
    flags: bool = False
    only_prints: bool = False

    @property
    def words(self) -> list[str]:
        """The name as words of a command line."""
        return self.name.split()


VERBS = (
    Verb(
        "recipes",
        "list the catalogue",
        ("lightspan recipes", "lightspan recipes --family contrastive --modality image"),
        "recipes",
        only_prints=True,
    ),
    Verb(
        "list",
        "list optimisers, methods or recipes with one line each",
        ("lightspan list optimizers", "lightspan list methods distillation"),
        "list",
        only_prints=True,
    ),
    Verb(
        "show",
        "print a recipe, or its merged form",
        (
            "lightspan show language/quickstart",
            "lightspan show language/quickstart -c scale/cpu2 --why trainer.max_steps",
        ),
        "show",
        flags=True,
        only_prints=True,
    ),
    Verb(
        "copy",
        "copy a recipe to a file of your own",
        ("lightspan copy language/quickstart mine.yaml", "lightspan copy masked/mae recipes/mine.yaml"),
        "copy",
    ),
    Verb(
        "check",
        "find every mistake before a run",
        (
            "lightspan check language/quickstart trainer.max_steps=200",
            "lightspan check contrastive/simclr -c scale/ddp",
        ),
        "check",
        flags=True,
    ),
    Verb(
        "new",
        "write the files of a new method",
        ("lightspan new contrastive/my_method", "lightspan new masked/my_method --in my_project"),
        "new",
    ),
    Verb(
        "plan",
        "estimate memory before anything starts",
        (
            "lightspan plan language/quickstart",
            "lightspan plan contrastive/simclr_imagenet -c scale/fsdp2 --ranks 8 --memory 80",
        ),
        "plan",
        flags=True,
    ),
    Verb(
        "fit",
        "train",
        (
            "lightspan fit language/quickstart trainer.max_steps=20",
            "lightspan fit contrastive/simclr --images my_pictures --run runs/mine",
        ),
        "fit",
        flags=True,
    ),
    Verb(
        "sweep",
        "train once for each of several settings and seeds, and rank them",
        (
            "lightspan sweep supervised/linear 'trainer.max_epochs=lin(5,15,3)' --metric val/accuracy --seeds 0,1,2",
            "lightspan sweep supervised/linear model.init_args.optimizer.init_args.lr=0.03,0.1 --workers 2 --out rates",
        ),
        "sweep",
        flags=True,
    ),
    Verb(
        "scaling",
        "train on ever larger parts of the data, and say what ten times the data would give",
        (
            "lightspan scaling supervised/linear --sizes 200 500 1000 2000 --metric val/accuracy --out curves/linear",
            "lightspan scaling supervised/linear --sizes 300 1000 3000 --seeds 0,1 --steps epochs --workers 2",
        ),
        "scaling",
        flags=True,
    ),
    Verb(
        "run",
        "run a recipe that does not train (an estimator or a merger)",
        (
            "lightspan run analysis/imagenet_protocol --encoder runs/mine --images my_pictures",
            "lightspan run merging/ties checkpoints.base=BASE checkpoints.mine=A checkpoints.yours=B",
        ),
        "run",
        flags=True,
    ),
    Verb(
        "merge",
        "merge checkpoints given on the command line, in their own format",
        (
            "lightspan merge A B --base BASE --method ties --out merged",
            "lightspan merge A B --method average --out mean",
        ),
        "merge",
    ),
    Verb(
        "submit",
        "train on a cluster: hand the run to SLURM, Kubernetes or torchrun",
        (
            "lightspan submit language/quickstart --to slurm --nodes 2 --gpus-per-node 8 --print",
            "lightspan submit language/quickstart --to kubernetes --gpus-per-node 8 --image hub/lightspan:1",
        ),
        "submit",
        flags=True,
    ),
    Verb(
        "validate",
        "measure a checkpoint on validation data",
        (
            "lightspan validate language/quickstart --ckpt runs/mine",
            "lightspan validate contrastive/simclr --images my_pictures --ckpt runs/mine/checkpoints/last.ckpt",
        ),
        "evaluate",
        run="run_validate",
        flags=True,
    ),
    Verb(
        "test",
        "measure a checkpoint on test data",
        (
            "lightspan test supervised/linear --ckpt runs/mine",
            "lightspan test supervised/linear --ckpt runs/mine data.init_args.batch_size=16",
        ),
        "evaluate",
        run="run_test",
        flags=True,
    ),
    Verb(
        "predict",
        "write the predictions of a checkpoint",
        (
            "lightspan predict supervised/linear --ckpt runs/mine",
            "lightspan predict supervised/linear --ckpt runs/mine --run runs/predictions",
        ),
        "evaluate",
        run="run_predict",
        flags=True,
    ),
    Verb(
        "prove-resume",
        "show that a killed and resumed run equals a straight one",
        (
            "lightspan prove-resume language/quickstart --kills 3",
            "lightspan prove-resume contrastive/moco --kills 1 --ranks 1,2 --steps 6",
        ),
        "prove_resume",
        flags=True,
    ),
    Verb(
        "intrinsic-dimension",
        "find how many random dimensions a recipe needs",
        (
            "lightspan intrinsic-dimension subspace/direct_mnist --grid 0,10,100,1000",
            "lightspan intrinsic-dimension subspace/direct_mnist --grid 0,200,400,800 --lrs 1e-3,1e-2 --workers 2",
        ),
        "intrinsic_dimension",
        flags=True,
    ),
    Verb(
        "runs",
        "list runs: what each was started with, how far it is, what it reached",
        (
            "lightspan runs --recipe 'language/*' --since 7d --best val/loss_nats",
            "lightspan runs sweeps --where trainer.max_steps=300 --csv runs.csv",
        ),
        "runs",
        only_prints=True,
    ),
    Verb(
        "runs tag",
        "give a run tags, or take them away",
        ("lightspan runs tag runs/mine baseline paper", "lightspan runs tag runs/mine paper --remove"),
        "runs_label",
        run="run_tag",
    ),
    Verb(
        "runs note",
        "write a note on a run",
        ("lightspan runs note runs/mine 'rank 48 is enough'", "lightspan runs note runs/mine --remove"),
        "runs_label",
        run="run_note",
    ),
    Verb(
        "runs clean",
        "show which runs failed, never started or stopped writing, and delete them after a yes",
        ("lightspan runs clean", "lightspan runs clean runs/old --status done --recipe 'language/*'"),
        "runs_clean",
    ),
    Verb(
        "replay",
        "take a step again whose loss or gradient was not finite, and name where that begins",
        ("lightspan replay runs/mine", "lightspan replay runs/mine --step 120 trainer.precision=32-true"),
        "replay",
        flags=True,
    ),
    Verb(
        "reproduce",
        "measure a row of the evidence, or a network of `pull`, again and compare it with what is stored",
        ("lightspan reproduce 16_nmc", "lightspan reproduce quality/stdlib/factored_muon --out again"),
        "reproduce",
    ),
    Verb(
        "report",
        "compare runs on one HTML page",
        ("lightspan report runs/mine", "lightspan report runs/mine runs/other --out compared.html --png compared.png"),
        "report",
    ),
    Verb(
        "watch",
        "show the report of runs in a browser on this machine, updated while they train",
        ("lightspan watch runs/mine", "lightspan watch runs/mine sweeps/lr --port 8700 --metric val/loss_nats"),
        "watch",
    ),
    Verb(
        "audit",
        "look at the weights of a checkpoint, or at what changed between two",
        (
            "lightspan audit runs/mine",
            "lightspan audit models/base models/tuned --rank 16 --only '*attn*' --out audits/tuned",
        ),
        "audit",
    ),
    Verb(
        "export",
        "write a checkpoint for other libraries",
        (
            "lightspan export runs/mine --to huggingface",
            "lightspan export runs/mine/checkpoints/last.ckpt --to onnx --out encoder",
        ),
        "export",
    ),
    Verb(
        "pull",
        "list small trained networks, or get the weights of one, checked",
        ("lightspan pull", "lightspan pull simclr-fashion --from s3://lab/zoo"),
        "pull",
    ),
    Verb(
        "fsck",
        "find damaged checkpoints of a run and move them out of the way",
        ("lightspan fsck runs/mine --dry-run", "lightspan fsck runs/mine"),
        "fsck",
    ),
    Verb(
        "data",
        "pack a folder into shards, verify them, or write their indices",
        ("lightspan data pack pictures --out packed --shard-size 256M", "lightspan data verify packed"),
        "data",
    ),
    Verb(
        "ledger",
        "account for the samples that a run consumed",
        ("lightspan ledger runs/mine", "lightspan ledger runs/language-quickstart/RUN"),
        "ledger",
        only_prints=True,
    ),
    Verb(
        "doctor",
        "look for problems with this machine and installation",
        ("lightspan doctor", "lightspan doctor --network"),
        "doctor",
        only_prints=True,
    ),
    Verb(
        "completion",
        "print a script with which a shell completes all this",
        ("lightspan completion bash", "lightspan completion fish"),
        "completion",
        only_prints=True,
    ),
)


def verb_of(arguments: Sequence[str]) -> Verb | None:
    """The verb that a command line begins with; None if there is none."""
    found = [verb for verb in VERBS if list(arguments[: len(verb.words)]) == verb.words]
    return max(found, key=lambda verb: len(verb.words), default=None)
