"""Train SPRC, with gated fusion or without, on CIRR or FashionIQ.

CIRR with fusion, the short way, ten epochs of batch 64:
    python src/blip_fine_tune_2.py --dataset CIRR --blip-model-name blip2_cir_align_prompt \\
        --backbone pretrain --num-epochs 10 --batch-size 64 --learning-rate 1e-5 --loss-align 0.4 \\
        --loss-rtc 0.4 --validation-frequency 1 --save-training --save-best --target-ratio 1.25 \\
        --transform targetpad
Plain SPRC: the same with --no-use-gated-fusion. As published it trains longer, in float16; on FashionIQ with
--num-epochs 30 --learning-rate 2e-5:
    python src/blip_fine_tune_2.py --dataset CIRR --no-use-gated-fusion --amp fp16 --num-epochs 50 \\
        --batch-size 128 --learning-rate 1e-5 --save-training --save-best
After a crash or Ctrl-C:
    python src/blip_fine_tune_2.py --resume RUN_FOLDER
Several trainings, each from the one before, as a file says:
    python src/blip_fine_tune_2.py --recipe configs/recipe_sprc_cirr.yaml
On N GPUs: torchrun --nproc-per-node N in place of python.
"""

from typing import Any

from sprc.errors import run_script
from sprc.settings import given_flags
from sprc.start_up import no_collection
from sprc.training.settings import default_flags, training_parser


def parse_arguments() -> tuple[dict[str, Any], dict[str, Any]]:
    """The defaults of all flags, and the flags that are given: a resumed run has flags of its own."""
    parser = training_parser(__doc__)
    given = given_flags(parser)
    if not given.keys() & {"dataset", "resume", "recipe"}:
        parser.error("give --dataset or --recipe to start a run, or --resume to go on with one")
    if given.keys() >= {"resume", "recipe"}:
        parser.error("--recipe goes on by itself with the same command; leave --resume out")
    return default_flags(), given


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    defaults, given = parse_arguments()
    with no_collection():
        from sprc.distributed import process_group
        from sprc.training.fine_tuning import fine_tune
        from sprc.training.recipe_run import run_recipe
        from sprc.training.resume import own_timeout

    timeout = given.get("timeout", defaults["timeout"])
    if "resume" in given and "timeout" not in given:
        timeout = own_timeout(given["resume"], timeout)
    with process_group(timeout):
        (run_recipe if "recipe" in given else fine_tune)(defaults, given)


if __name__ == "__main__":
    run_script(main)
