"""Trains every arm with every seed at equal cost, and writes a table and a plot.

python examples/replicate/study.py --text 'books/*.txt' \\
    --output runs/study --config examples/replicate/study_cpu.yaml --seeds 3

All arms run with the first seed, then with the next one, so arms can be
compared early. After each run the study rewrites OUTPUT/study.md, study.json
and loss.png from the metrics of all finished runs. --status only does that;
--plan only prints what would run.

Run the same command again to resume a study that has stopped: by Ctrl-C or
SIGTERM (its runs save first; exit code 75), or by --seconds. On a GPU,
--parallel lets several small models share one device:

python examples/replicate/study.py --text 'books/*.txt' --output runs/study \\
    --config examples/replicate/study_gpu_minutes.yaml --vocab-size 8192 \\
    --arms patch-k2 patch-k4 superposition-k2-long --seeds 1 --parallel 4 \\
    --seconds 120 --keep-going

A configuration may have a section `study` with the arms to run and with the
tuned options of several optimizers (examples/replicate/study_optimizers.yaml).
muon-NAME is arm NAME with Muon, and NAME+OPTION=VALUE is arm NAME with one more
option, such as token-wsd-long+lr=0.016.

--records FILE keeps the finished runs in a small file, to be committed: a clone
continues from it without the folders of the runs.

To add an arm, write a script that calls main(argv, more_arms=[Arm(...)]).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.errors import ConfigError
from megatron_patch.programs import shipped
from megatron_patch.replication.arms import Arm
from megatron_patch.replication.study import VOCAB_SIZE, Study
from megatron_patch.requirements import require
from megatron_patch.utils.console import make_console


def main(argv: list[str], more_arms: Sequence[Arm] = ()) -> None:
    """Runs the study.

    Args:
        argv: the command line, without the program's name.
        more_arms: arms in addition to those of arms.py; --arms, --plan and the tables include them.

    Raises:
        ConfigError: a flag or an arm is wrong, or the folder holds another study.
        DataError: a run failed.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--text", nargs="+", default=[], help="text to train on: .txt or .jsonl files, also compressed, or quoted globs")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study"), help="folder for dataset, runs and results (default: runs/study)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=shipped("examples/replicate/study_cpu.yaml"),
        help="YAML file with model, batch and learning rate (default: examples/replicate/study_cpu.yaml)",
    )
    parser.add_argument("--budget", help="cost tokens per arm (default: train-tokens of the configuration)")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[],
        help="run these arms and their baselines only, in this order (default: those of the configuration's section study, else all)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="number of runs at a time; they divide the CPU cores or share the GPUs (default: 1)",
    )
    parser.add_argument("--seconds", type=float, help="time limit of the study: unfinished runs then save and stop")
    parser.add_argument("--keep-going", action="store_true", help="start the remaining runs although one has failed")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints per run; 1 suits runs of a minute (default: 4)")
    parser.add_argument(
        "--vocab-size",
        help=f"vocabulary of the tokenizer that is trained on the text (default: that of the section study, else {VOCAB_SIZE})",
    )
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="file of finished runs: these are not trained again, and new ones are added"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="Markdown file that receives the tables between <!-- NAME --> and <!-- end of NAME -->",
    )
    parser.add_argument("--docs-name", help="NAME of these markers and of the plots (default: name of the configuration)")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument("--gpu", help="with --plan: estimate the time of every arm on one GPU of this kind, such as H200")
    parser.add_argument("--status", action="store_true", help="write the results of the finished runs, and stop")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.parallel < 1 or args.saves < 1:
        raise ConfigError(
            f"--seeds {args.seeds}, --parallel {args.parallel}, --saves {args.saves}",
            "whole numbers from 1",
            "raise the value that is below 1",
        )
    if args.gpu and not args.plan:
        raise ConfigError(f"--gpu {args.gpu} without --plan", "--gpu with --plan, which estimates times", "add --plan, or remove --gpu")
    if not args.plan and not args.status:
        require("deepspeed", "a study")
    console = make_console(width=150)
    study = Study(args, console, more_arms)
    if args.plan:
        study.print_plan()
    elif args.status:
        study.write()
    else:
        study.train_all()
