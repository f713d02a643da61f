"""Several ranks against one: training, validation, submission, the feature cache, and how all of them end.

`several_ranks.py` runs the cases, once for all tests here; two agents of torchrun run the script as users do.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, read_csv, run
from helpers.small_models import small_config
from helpers.small_split import NAMES

from sprc.data.datasets import SteadyLoader
from sprc.distributed import process_group
from sprc.errors import InputError
from sprc.files import append_csv, write_csv, write_json
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.gated_fusion import FUSION_STRATEGIES
from sprc.training.loop import EpochOrder, TrainingConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(data, trained, tmp_path_factory):
    """What several_ranks.py leaves."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = trained[0] / "saved_models" / "tuned_clip_arithmetic.pt"
    command = [sys.executable, ROOT / "tests" / "helpers" / "several_ranks.py", folder, data, checkpoint]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    result = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def codes(folder):
    return json.loads((folder / "codes.json").read_text())


def said(folder):
    """The lines on stderr of each rank, progress bars left out."""
    ranks = range(len(codes(folder)))
    lines = [(folder / f"stderr_{number}.txt").read_text().splitlines() for number in ranks]
    return [[line for line in of_one if line.strip() and "it/s" not in line] for of_one in lines]


def joined(lists):
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize("fusion", ["on", "off"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps_of_several_ranks_are_those_of_one(out, ranks, fusion):
    """In float64: the keys' biases have no gradient, as softmax does not see them, and AdamW makes steps of
    the learning rate's size out of float32's rounding of that zero. At the published rate of 1e-5 these are
    below 1e-5 anyway; here the rate is a hundred times that, so that 20 steps go far.
    """
    one, several = (load(out / f"plain_{fusion}_{number}" / "found.pt") for number in (1, ranks))
    assert codes(out / f"plain_{fusion}_{ranks}") == [0] * ranks
    assert len(one["losses"]) == len(several["losses"]) == 20
    for mine, theirs in zip(several["losses"], one["losses"], strict=True):
        assert list(mine) == list(theirs)
        for name in ("train_loss", "loss_itc", "loss_rtc", "loss_align"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name
    first, last = (one["losses"][step]["loss_itc"] for step in (0, -1))
    assert last < 0.75 * first  # the weights did move
    assert list(several["gradients"]) == list(one["gradients"])
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(several["gradients"][name], gradient, rtol=1e-6, atol=1e-10, msg=name)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], weight, rtol=0, atol=1e-9, msg=name)


def test_the_complementary_losses_of_two_ranks_are_those_of_one(out):
    one, two = (load(out / f"complementary_{number}" / "found.pt") for number in (1, 2))
    assert len(one["losses"]) == 4
    for mine, theirs in zip(two["losses"], one["losses"], strict=True):
        assert mine.keys() >= {"loss_itc_complementary", "loss_rtc_complementary"}
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-3 if name == "gate_std" else 1e-6), name
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-10, msg=name)


def test_a_part_that_learns_alone_does_so_on_all_ranks(out):
    one, two = (load(out / f"alone_on_{ranks}" / "found.pt") for ranks in (1, 2))
    assert len(one["losses"]) == len(two["losses"]) == 8
    assert list(one["gradients"]) == list(two["gradients"])
    assert all(name.startswith("gated_fusion.") for name in one["gradients"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("fusion", "ranks"), [("on", 1), ("off", 2), ("on", 4)])
def test_gradient_caching_changes_neither_losses_nor_gradients(out, fusion, ranks):
    one, cached = (load(out / f"{way}/found.pt") for way in (f"plain_{fusion}_1", f"cached_{fusion}_{ranks}"))
    assert len(cached["losses"]) == 8
    for mine, theirs in zip(cached["losses"], one["losses"], strict=False):
        assert set(mine) == set(theirs)
        for name in mine:
            # A part's spread is a little smaller than the whole's.
            assert mine[name] == pytest.approx(theirs[name], abs=1e-3 if name == "gate_std" else 1e-6), name
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(cached["gradients"][name], gradient, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("several", ["wider_2", "wider_2_cached"])
def test_a_bank_and_mined_images_of_two_ranks_are_those_of_one(out, several):
    one, two = (load(out / name / "found.pt") for name in ("wider_1", several))
    assert torch.equal(two["drawn"], one["drawn"])
    torch.testing.assert_close(two["bank"], one["bank"])  # of the second epoch, after four steps
    assert len(one["losses"]) == len(two["losses"]) == 8
    for mine, theirs in zip(two["losses"], one["losses"], strict=True):
        assert set(mine) == set(theirs) >= {"loss_bank", "loss_mined", "loss_rtc", "loss_align"}
        for name in mine:
            slack = 5e-3 if name == "gate_std" else 1e-5  # the spread of four rows is smaller than of eight
            assert mine[name] == pytest.approx(theirs[name], abs=slack), name
    assert set(two["gradients"]) == set(one["gradients"])
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("several", ["reranker_2", "reranker_2_cached"])
def test_a_re_ranker_of_two_ranks_is_that_of_one(out, several):
    """In float32: the first stage's vectors are, whatever the default."""
    assert codes(out / several) == [0, 0]
    one, two = (load(out / name / "found.pt") for name in ("reranker_1", several))
    assert len(one["losses"]) == len(two["losses"]) == 6
    for mine, theirs in zip(two["losses"], one["losses"], strict=True):
        assert set(mine) == set(theirs) == {"train_loss", "loss_itm"}
        assert mine["loss_itm"] == pytest.approx(theirs["loss_itm"], rel=1e-4)
    assert set(two["gradients"]) == set(one["gradients"])
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_two_ranks_share_the_images_that_a_re_ranker_looks_at(out):
    one = load(out / "reranker_1" / "matches_0.pt")
    two = [load(out / "reranker_2" / f"matches_{number}.pt") for number in (0, 1)]
    assert all(torch.equal(found["scores"], one["scores"]) for found in two)
    assert one["calls"] == 3
    assert [found["calls"] for found in two] == [2, 2]  # of two batches and of one


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_log_of_the_fusion_is_that_of_the_whole_batch(out, ranks):
    one, several = (read_csv(out / f"plain_on_{number}" / "fusion_metrics.csv") for number in (1, ranks))
    cached = read_csv(out / "cached_on_4" / "fusion_metrics.csv")
    assert [row["step"] for row in several] == [str(step) for step in range(0, 20, 2)]
    for rows in (several, cached):
        for mine, theirs in zip(rows, one, strict=False):
            for name in theirs:
                slack = {"gate_std": 1e-3}.get(name, 1e-6)
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-6, abs=slack), name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("fusion", ["True", "False"])
def test_encoded_splits_are_the_same_to_the_bit_and_each_image_is_read_once(out, ranks, fusion):
    one = load(out / "encode_1" / f"encoded_{fusion}_0.pt")
    several = [load(out / f"encode_{ranks}" / f"encoded_{fusion}_{number}.pt") for number in range(ranks)]
    for found in several:
        for name in ("gallery", "composed", "text"):
            assert torch.equal(found[name], one[name]), name
    assert sorted(name for found in several for name in found["read"]) == NAMES
    assert max(len(found["read"]) for found in several) < len(NAMES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_feature_cache_is_filled_once_an_image_and_the_same_to_the_byte(out, ranks):
    folders = [next((out / f"cache_{number}" / "cache").iterdir()) for number in (1, ranks)]
    for name in ("tokens.bin", "index.txt", "key.json", "files.json"):
        if (folders[0] / name).exists():  # files.json only after two seconds
            assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes(), name
    for count, new in ((7, 7), (9, 2)):
        one = load(out / "cache_1" / f"filled_{count}_0.pt")
        several = [load(out / f"cache_{ranks}" / f"filled_{count}_{r}.pt") for r in range(ranks)]
        assert [found["told"] for found in several] == [new] * ranks
        assert sum(found["computed"] for found in several) == one["computed"] == new
        assert all(torch.equal(found["tokens"], one["tokens"]) for found in several)


def test_a_submission_of_two_ranks_is_that_of_one(out):
    for name in ("recall_submission_test.json", "recall_subset_submission_test.json"):
        assert (out / "submit_2" / name).read_bytes() == (out / "submit_1" / name).read_bytes()
    told = [json.loads((out / "submit_2" / f"told_{number}.json").read_text()) for number in (0, 1)]
    assert told[0] == told[1] == ["recall_submission_test.json", "recall_subset_submission_test.json"]


def test_two_ranks_score_circo_as_one_does(out):
    assert codes(out / "circo_2") == [0, 0]
    for name in ("ranks.csv", "rankings.json", "metrics_0.json"):
        assert (out / "circo_2" / name).read_bytes() == (out / "circo_1" / name).read_bytes()
    for query in ("caption", "concept"):
        name = f"circo_submission_{query}_test.json"
        assert (out / "circo_2" / name).read_bytes() == (out / "circo_1" / name).read_bytes()
    metrics = [json.loads((out / "circo_2" / f"metrics_{number}.json").read_text()) for number in (0, 1)]
    assert metrics[0] == metrics[1]


def test_weights_are_fetched_by_one_rank_of_a_machine_first(out):
    assert codes(out / "fetch") == [0, 0]
    assert [path.name for path in (out / "fetch").glob("fetched_*")] == ["fetched_0"]


def test_a_signal_to_one_rank_stops_all_and_two_resumed_ranks_end_as_if_never_stopped(out):
    for number in (0, 1):
        assert (out / "stopped" / f"stopped_{number}.txt").read_text() == "SIGTERM"
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (out / "stopped" / name).read_bytes() == (out / "whole" / name).read_bytes()
    ended, whole = (load(out / name / "found.pt") for name in ("stopped", "whole"))
    assert ended["note"] == ""
    assert len(whole["losses"]) == 12
    assert ended["losses"] == whole["losses"][6:]
    for name, weight in whole["weights"].items():
        assert torch.equal(ended["weights"][name], weight), name


@pytest.mark.parametrize("number", [1, 3])
def test_a_signal_in_validation_stops_all_ranks_there_and_no_step_is_repeated(out, number):
    folder = out / f"validating_{number}"
    for rank in (0, 1):
        assert (folder / f"stopped_{rank}.txt").read_text() == "SIGTERM"
    assert codes(folder) == [0, 0]
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (folder / name).read_bytes() == (out / "whole" / name).read_bytes()
    ended, whole = load(folder / "found.pt"), load(out / "whole" / "found.pt")
    assert ended["losses"] == whole["losses"][8:]
    for name, weight in whole["weights"].items():
        assert torch.equal(ended["weights"][name], weight), name


def test_another_number_of_ranks_goes_on_with_a_validation(out):
    found = load(out / "validating_alone" / "found.pt")
    assert found["note"] == "; 2 ranks saved it and 1 go on"
    assert len(found["losses"]) == 4
    rows, theirs = (read_csv(out / name / "train_metrics.csv") for name in ("validating_alone", "whole"))
    assert rows[:2] == theirs[:2]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]


def test_control_c_is_one_line_of_all_ranks(out):
    assert codes(out / "control_c") == [130, 130]
    assert joined(said(out / "control_c")) == ["stopped by SIGINT"]


def test_another_number_of_ranks_begins_the_epoch_again_and_says_so(out):
    found = load(out / "stopped_too" / "found.pt")
    told = "; 2 ranks saved it and 1 go on, so epoch 1 begins again and its 2 steps are dropped"
    assert found["note"] == told
    assert len(found["losses"]) == 8
    rows, theirs = (read_csv(out / name / "train_metrics.csv") for name in ("stopped_too", "whole"))
    assert rows[0] == theirs[0]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[1] != theirs[1]  # dropout draws other numbers
    assert float(rows[1]["loss_itc"]) == pytest.approx(float(theirs[1]["loss_itc"]), rel=0.3)
    assert not (out / "stopped_too" / "saved_models" / "training_state_of_epoch.pt").exists()


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_one_line(out):
    assert codes(out / "not_a_number") == [1, 1]
    lines = [line for of_one in said(out / "not_a_number") for line in of_one]
    assert len(lines) == 1
    assert lines[0].startswith(
        "error: the loss is not finite at epoch 0, step 2 (loss_first=nan, loss_second="
    )
    assert "on rank 1; lower" in lines[0]


@pytest.mark.parametrize(("case", "wanted"), [("all", [2, 2, 2, 2]), ("one", [1, 1, 2, 1])])
def test_bad_input_is_one_line_whoever_meets_it(out, case, wanted):
    folder = out / f"bad_input_of_{case}"
    assert codes(folder) == wanted
    assert joined(said(folder)) == ["error: --flag 1 is wrong; give another"]


def test_a_rank_that_runs_out_of_memory_is_named_and_ends_all(out):
    assert codes(out / "out_of_memory") == [1, 1]
    (line,) = joined(said(out / "out_of_memory"))
    assert line.startswith("error: rank 1 of 2: memory ran out on cpu with --batch-size 64 (")
    assert line.endswith("what helps, best first: a smaller --batch-size. What was saved stays")


def test_a_bug_keeps_its_traceback_and_the_others_are_silent(out):
    assert codes(out / "bug") == [1, 1]
    first, second = said(out / "bug")
    assert first == []
    assert second[-1] == "ZeroDivisionError: a bug"


def test_a_killed_rank_and_a_stuck_one_are_named(out):
    assert codes(out / "killed") == [1, 1, -signal.SIGKILL, 1]
    (line,) = joined(said(out / "killed"))
    assert line.startswith("error: rank 2 of 4 (")
    assert "has died or was stopped" in line
    # Nobody ends the rank that sleeps here, as torchrun would; it notices when it wakes.
    assert codes(out / "stuck")[0] == 1
    (line,) = said(out / "stuck")[0]
    assert line.startswith("error: rank 1 of 2 (")
    assert "did not come within --timeout 3 seconds" in line


STRATEGIES = [{"use_gated_fusion": False}, *({"fusion_strategy": name} for name in FUSION_STRATEGIES)]


@pytest.mark.parametrize("vit", ["eva", "clip"])
@pytest.mark.parametrize("changes", STRATEGIES, ids=str)
def test_all_that_is_trained_gets_a_gradient(tokenizer, changes, vit):
    """Or DistributedDataParallel would wait for it."""
    config = small_config(**changes, vit=vit, freeze_vit=False)
    model = Blip2QformerCirAlignPrompt(config, tokenizer)
    image, target = torch.randn(2, 3, 3, config.image_size, config.image_size)
    sum(model({"image": image, "target": target, "text_input": ["a star", "a", "red"]}).values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_ranks_share_each_batch_of_the_single_process(monkeypatch):
    def order(ranks, number, start):
        monkeypatch.setattr("sprc.training.loop.world_size", lambda: ranks)
        monkeypatch.setattr("sprc.training.loop.rank", lambda: number)
        found = EpochOrder(23, seed=3, batch_size=6)
        found.epoch, found.start = 2, start
        items = list(found)
        assert len(items) == len(found)
        return items

    for start in (0, 6, 18):
        whole = order(1, 0, start)
        assert len(whole) == 18 - start
        parts = [order(3, number, start) for number in range(3)]
        for batch in range(len(whole) // 6):
            shares = [part[2 * batch : 2 * batch + 2] for part in parts]
            assert joined(shares) == whole[6 * batch : 6 * batch + 6]


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"batch_size": 30}, 4, "--batch-size 30 is that of all ranks .* number, 4; give 28 or 32"),
        ({"batch_size": 2}, 4, "--batch-size 2 is that of all ranks .* number, 4; give 4$"),
        (
            {"batch_size": 16, "grad_cache": 8},
            2,
            "--grad-cache 8 saves nothing: a rank's batch is 8 triplets",
        ),
        (
            {"batch_size": 16, "grad_cache": 99},
            1,
            "--grad-cache 99 saves nothing: .* 16 triplets; give fewer",
        ),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch, changes, ranks, message):
    monkeypatch.setattr("sprc.training.optimisation.world_size", lambda: ranks)
    with pytest.raises(InputError, match=message):
        TrainingConfig(**changes).check_fits(1000)


def test_a_chunk_or_a_time_out_of_nothing_is_refused():
    with pytest.raises(InputError, match="--grad-cache 0 is too small; the least is 1"):
        TrainingConfig(grad_cache=0)
    assert TrainingConfig().grad_cache is None
    with pytest.raises(InputError, match="--timeout 0 is too small"), process_group(0):
        raise AssertionError("it began")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "has WORLD_SIZE, but its RANK is not set; start with torchrun"),
        ({"WORLD_SIZE": "four"}, "its WORLD_SIZE is 'four', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "has RANK=2, which is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "its MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"},
            "rank 1 of 2 did not find the others within 1 s",
        ),
    ],
)
def test_an_environment_that_is_not_torchrun_s_is_refused(monkeypatch, environment, message):
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in ("RANK", "WORLD_SIZE", *rest):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**rest, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), process_group(1):
        raise AssertionError("it began")


def test_rank_0_alone_writes(monkeypatch, tmp_path):
    for number, wanted in ((1, []), (0, ["a.csv", "b.json", "c.csv"])):
        monkeypatch.setattr("sprc.files.rank", lambda number=number: number)
        write_csv(tmp_path / "a.csv", [{"x": 1}])
        write_json(tmp_path / "b.json", {})
        append_csv(tmp_path / "c.csv", {"x": 1})
        assert sorted(path.name for path in tmp_path.iterdir()) == wanted


def test_a_reader_outlives_a_signal_that_its_parent_did_not_send():
    loader = SteadyLoader(range(40), num_workers=1, prefetch_factor=1)
    items = iter(loader)
    found = [next(items).item()]
    (worker,) = items._workers
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        subprocess.run(["kill", f"-{int(signum)}", str(worker.pid)], check=True)
    found += [item.item() for item in items]
    assert found == list(range(40))
    items = iter(loader)
    (worker,) = items._workers
    next(items)
    worker.terminate()  # as at the parent's end
    worker.join(10)
    assert not worker.is_alive()


# --- the script, as two machines run it

# As the fixture `trained`, with gradient caching: `tiny` has no dropout, so the end is the same.
STARTED = ("--num-epochs", 2, "--batch-size", 16, "--learning-rate", 1e-3, "--save-training", "--save-best")
SHARED = ("--checkpoint-every", 2, "--num-workers", 1, "--grad-cache", 5)


def agent(port, *flags):
    """torchrun on one of two machines, with one process."""
    launcher = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test")
    command = [sys.executable, "-m", "torch.distributed.run", *launcher]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", ROOT / "src" / "blip_fine_tune_2.py", *flags]
    return subprocess.Popen(
        [*map(str, command)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers_of(process):
    """Process ids of an agent's ranks."""
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(line) for line in children.stdout.split()]


def test_two_agents_train_as_one_process_a_killed_rank_is_named_and_one_process_goes_on(
    data, trained, tmp_path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (
        "--dataset",
        "CIRR",
        "--backbone",
        "tiny",
        "--data-path",
        data,
        "--models-path",
        tmp_path / "two",
    )
    agents = [agent(port, *flags, *STARTED, *SHARED) for _ in range(2)]
    end = time.monotonic() + 240
    while not any((tmp_path / "two").glob("*/saved_models/training_state_of_epoch.pt")):
        assert all(one.poll() is None for one in agents), [one.communicate() for one in agents]
        assert time.monotonic() < end
        time.sleep(0.02)
    (victim,) = workers_of(agents[1])
    os.kill(victim, signal.SIGKILL)
    outputs = [one.communicate(timeout=120) for one in agents]
    assert all(one.returncode for one in agents)
    errors = [[line for line in err.splitlines() if line.startswith("error: ")] for _, err in outputs]
    (line,) = joined(errors)
    assert line.startswith("error: rank 1 of 2 (")
    assert f"process {victim}) has died" in line
    assert f"pid: {victim}" in outputs[1][1]  # torchrun's own report
    assert sum("run folder: " in output for output, _ in outputs) == 1
    lines = [line for output, _ in outputs for line in output.splitlines() if line.startswith("device: ")]
    assert lines == ["device: cpu, 1 thread, float32, 2 ranks (CUDA_VISIBLE_DEVICES hides all GPUs)"]
    assert sum("epoch 0: R@1" in output for output, _ in outputs) == 1

    (folder,) = (tmp_path / "two").iterdir()
    stdout, _ = run("blip_fine_tune_2.py", "--resume", folder)
    assert "; 2 ranks saved it and 1 go on, so epoch 1 begins again" in stdout
    # In percent: a query or two of 36 in validation.
    for name, slack in (("train_metrics.csv", 2e-3), ("validation_metrics.csv", 6)):
        mine, theirs = read_csv(folder / name), read_csv(trained[0] / name)
        assert len(mine) == len(theirs) == 2
        for my_row, their_row in zip(mine, theirs, strict=True):
            for key, value in their_row.items():
                assert float(my_row[key]) == pytest.approx(float(value), abs=slack), key
