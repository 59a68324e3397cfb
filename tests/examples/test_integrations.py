"""The examples of integrations, each with its real library: over a switch, resumed in the middle of a stage, and against this program.

Who wrote a trainer of their own copies these files, so they are used here as they are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.integrations import plain_loop
from megatron_patch.engine.environment import free_port
from megatron_patch.errors import ConfigError
from megatron_patch.library import DocumentMasking, TokenStream, build_plan
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import EOD, Run, command, make_corpus, printed, start_program
from tests.examples.sizes import plain_plan

FOLDER = Path(plain_loop.__file__).parent
T, SEED, SPLIT = 16, 7, "90,10,0"
SIZES = {
    "patch_size": 4,
    "train_tokens": 4608,
    "seq_length": T,
    "global_batch_size": 12,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_warmup_tokens": 768,
}
OURS = (
    f"--recipe patch-train --patch-size 4 --train-tokens 4608 --seq-length {T} --global-batch-size 12 --lr 3e-3 --min-lr 3e-4"
    f" --lr-warmup-tokens 768 --split {SPLIT} --seed {SEED} --micro-batch-size 3 --eval-tokens 64 --finetune --num-workers 1"
)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_integration_is_short(path):
    assert len(path.read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "walks")


def plain_records(capsys, *words):
    plain_loop.main([*words, "--train-tokens", str(12 * 2048)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def seen(monkeypatch):
    """The inputs of every micro-batch that the plain loop trains on."""
    inputs, original = [], plain_loop.loss_of

    def loss_of(model, batch):
        inputs.append(batch["input_ids"].clone())
        return original(model, batch)

    monkeypatch.setattr(plain_loop, "loss_of", loss_of)
    return inputs


@pytest.mark.parametrize("stop", [3, 8, 10])
def test_the_plain_loop_resumes_bit_for_bit(tmp_path, capsys, seen, stop):
    """Stopped in the patch stage, at the switch, and in the token stage."""
    whole = plain_records(capsys, "--save", str(tmp_path / "whole.pt"))
    read = list(seen)
    seen.clear()
    first = plain_records(capsys, "--save", str(tmp_path / "run.pt"), "--stop-after", str(stop))
    second = plain_records(capsys, "--save", str(tmp_path / "run.pt"))
    assert len(first) == stop and first + second == whole
    assert [record["patch_size"] for record in whole] == [4] * 8 + [1] * 4
    assert len(seen) == len(read) and all(map(torch.equal, seen, read))


def test_the_plain_loop_computes_the_published_loss():
    """Of its first batch, by dense formulas, at K = 4 and K = 1."""
    torch.manual_seed(0)
    model = plain_loop.Transformer()
    for k in (4, 1):
        tokens = torch.randint(256, (3, 9 * k))
        patches = tokens.unflatten(1, (-1, k))
        log_p = torch.log_softmax(model(model.table(patches[:, :-1]).mean(dim=2)) @ model.head.weight.T, dim=-1)
        batch = {"input_ids": patches[:, :-1], "labels": patches[:, 1:], "label_weights": torch.ones(k)}
        total = plain_loop.loss_of(model, batch)
        assert total.item() == pytest.approx(-log_p.gather(2, patches[:, 1:]).sum().item(), rel=1e-6)
        assert plain_loop.weight_of(batch) == 3 * 8 * k


# Hugging Face's Trainer


def make_model(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": T, "bos_token_id": None, "eos_token_id": EOD}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, tie_word_embeddings=False),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=64, n_positions=T, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **dropout
        ),
    }[kind]()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


RULES = DocumentMasking(eod_id=EOD, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)


def trainer_of(model, corpus, folder, documents=None, stop=None, **more):
    from transformers import TrainerCallback

    from examples.integrations import with_hugging_face

    plan = build_plan("patch-train", gradient_accumulation=3, **SIZES)
    stream = TokenStream(plan, corpus, seed=SEED, split=SPLIT, vocab_size=64, documents=documents, gradient_accumulation=3)
    arguments = {
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = with_hugging_face.make_trainer(model, stream, gradient_accumulation=3, **{**arguments, **more})
    if stop is not None:

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        trainer.add_callback(Stop())
    return trainer


def losses_of(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.fixture(scope="module")
def ours(tmp_path_factory, corpus):
    """Runs this program from a model of transformers, and returns its records."""
    from megatron_patch.convert.flags import training_flags
    from megatron_patch.convert.from_hugging_face import from_hugging_face

    def run(kind, *more):
        folder = tmp_path_factory.mktemp(kind)
        make_model(kind).save_pretrained(str(folder / "public"))
        imported = from_hugging_face(folder / "public", folder / "imported")
        flags = training_flags(imported.shape, imported.family)
        paths = ["--data-path", corpus, "--load", str(folder / "imported"), "--save", str(folder / "run")]
        assert run_ranks(start_program, 1, folder / "run-logs", command(flags, OURS, *more, paths)) == [0], printed(folder / "run")
        return Run(folder / "run").records("step")

    return run


DOCUMENTS = "--reset-attention-mask --reset-position-ids --eod-mask-loss"


@pytest.mark.parametrize(("kind", "documents"), [("llama", False), ("qwen3", False), ("gpt2", False), ("llama", True)])
def test_hugging_faces_trainer_has_the_losses_of_this_program(tmp_path, corpus, ours, kind, documents):
    model = make_model(kind)
    trainer = trainer_of(model, corpus, tmp_path, RULES if documents else None)
    trainer.train()
    expected = ours(kind, f"{DOCUMENTS} --eod-token-id {EOD}" if documents else "")
    found = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["patch_size"] for record in expected] == [4] * 16 + [1] * 8
    for name, other, tolerance in (("loss", "loss", 1e-5), ("grad_norm", "grad_norm", 1e-4), ("learning_rate", "lr", 1e-9)):
        values = [record[name] for record in found]
        assert values == pytest.approx([record[other] for record in expected], rel=tolerance), name
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.3
    # It is a model of transformers still.
    tokens = torch.arange(8)[None]
    assert model(input_ids=tokens, labels=tokens).loss > 0 and model.generate(tokens, max_new_tokens=2, pad_token_id=0).shape == (1, 10)


@pytest.mark.parametrize("stop", [5, 16, 20])
def test_hugging_faces_trainer_resumes_without_repeating_a_token(tmp_path, corpus, stop):
    whole = trainer_of(make_model("gpt2"), corpus, tmp_path / "whole")
    whole.train()
    first = trainer_of(make_model("gpt2"), corpus, tmp_path / "run", save_strategy="steps", save_steps=stop, stop=stop)
    first.train()
    second = trainer_of(make_model("gpt2"), corpus, tmp_path / "run")
    second.train(resume_from_checkpoint=True)
    assert len(losses_of(first)) == stop and losses_of(second) == losses_of(whole)  # its log has the first part too


def test_wrong_settings_of_hugging_faces_trainer_are_named_at_once(tmp_path, corpus):
    wrong = {"gradient_accumulation_steps": 4, "max_steps": 5, "per_device_train_batch_size": 8, "ignore_data_skip": False}
    with pytest.raises(ValueError, match="middle of an accumulation") as caught:
        trainer_of(make_model("llama"), corpus, tmp_path, **wrong, accelerator_config=None).train()
    for words in ("max_steps is 5; allowed: 24", "per_device_train_batch_size .* is 8", "ignore_data_skip .* is False", "dispatch_batches"):
        assert caught.match(words)


def test_a_model_that_changes_its_logits_is_refused():
    transformers = pytest.importorskip("transformers")
    from examples.integrations.with_hugging_face import read_patches

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**sizes, num_key_value_heads=2))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM scales its embeddings"):
        read_patches(model)


# Lightning


def losses_by_lightning(folder, tokens, stop=None, resume=None, accumulation=4):
    """Trains the plain loop's model; returns (patch size, loss) of each step and the inputs of each micro-batch."""
    lightning = pytest.importorskip("lightning")
    from examples.integrations import with_lightning

    plan = plain_plan(gradient_accumulation=4)
    torch.manual_seed(0)
    model = plain_loop.Transformer()
    module = with_lightning.PatchModule(model, model.table, model.head, plan, tokens, vocab_size=256)
    steps, inputs, sums = [], [], []

    class Record(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            inputs.append(batch["input_ids"].clone())
            sums.append(float(trainer.callback_metrics["train_loss"]))
            if len(inputs) % 4 == 0:
                steps.append((batch["input_ids"].shape[-1], sum(sums) / 4))
                sums.clear()

    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = with_lightning.make_trainer(
        plan, default_root_dir=folder, accumulate_grad_batches=accumulation, callbacks=[Record()], enable_checkpointing=False,
        **quiet, **({"max_steps": stop} if stop else {}),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return steps, inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 8, 10])
def test_lightning_trains_and_resumes_as_the_plain_loop(tmp_path, stop):
    """Stopped in the patch stage, at the switch, and in the token stage."""
    tokens = plain_loop.library_source(2 * 12 * 2048)
    whole, read = losses_by_lightning(tmp_path, tokens)
    first, first_read = losses_by_lightning(tmp_path, tokens, stop=stop)
    second, second_read = losses_by_lightning(tmp_path, tokens, resume=tmp_path / "last.ckpt")
    assert len(first) == stop and first + second == whole
    assert len(read) == len(first_read + second_read) and all(map(torch.equal, read, first_read + second_read))
    plan = plain_plan(gradient_accumulation=4)
    stream = TokenStream(plan, tokens, vocab_size=256)
    expected = [(record["patch_size"], record["loss"]) for record in plain_loop.train(plan, stream, tmp_path / "plain.pt")]
    assert [size for size, _ in whole] == [4] * 8 + [1] * 4 == [size for size, _ in expected]
    assert [loss for _, loss in whole] == pytest.approx([loss for _, loss in expected], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightning_is_refused_another_accumulation(tmp_path):
    pytest.importorskip("lightning")
    with pytest.raises(ConfigError, match="middle of an accumulation"):
        losses_by_lightning(tmp_path, plain_loop.library_source(2 * 12 * 2048), accumulation=2)


def weights_by_lightning(folder, ranks):
    """Trains on the ranks that are there, each as a device, and returns all weights."""
    from examples.integrations import with_lightning

    if ranks > 1:  # as torchrun sets them
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    plan = plain_plan(gradient_accumulation=4 // ranks, world_size=ranks)
    torch.manual_seed(0)
    model = plain_loop.Transformer()
    tokens = plain_loop.library_source(2 * plan.tokens)
    module = with_lightning.PatchModule(model, model.table, model.head, plan, tokens, vocab_size=256)
    trainer = with_lightning.make_trainer(
        plan, default_root_dir=folder, accumulate_grad_batches=4 // ranks, accelerator="cpu", devices=ranks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, strategy="ddp" if ranks > 1 else "auto",
    )  # fmt: skip
    trainer.fit(module)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_devices_of_lightning_train_as_one(tmp_path):
    pytest.importorskip("lightning")
    alone = weights_by_lightning(tmp_path / "one", 1)
    torch.manual_seed(0)
    initial = torch.nn.utils.parameters_to_vector(plain_loop.Transformer().parameters()).detach().numpy()
    for weights in run_ranks(weights_by_lightning, 2, tmp_path / "logs", tmp_path / "two", 2):
        # Key biases have no gradient but rounding, which Adam scales up.
        assert np.linalg.norm(weights - alone) < 1e-3 * np.linalg.norm(alone - initial)


# torchtitan


def steps_by_torchtitan(folder, steps):
    """Runs torchtitan's Trainer in a process of its own; returns the records of its steps."""
    command = [sys.executable, "-m", "tests.examples.titan", str(folder), str(steps)]
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(FOLDER.parent.parent), "TORCHDYNAMO_DISABLE": "1"}
    environment = {name: value for name, value in environment.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=FOLDER.parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("RECORD")]


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs torchtitan, which needs triton also without a GPU")
def test_torchtitan_trains_over_a_switch_and_resumes_without_repeating_a_token(tmp_path):
    """Each micro-batch's loss is compared with plain formulas in that process."""
    whole = steps_by_torchtitan(tmp_path / "whole", 12)
    assert [size for _, size, *_ in whole] == [4] * 8 + [1] * 4
    inputs = [one for *_, seen in whole for one in seen]
    assert len(set(inputs)) == len(inputs) == 48
    for stop in (3, 8, 10):
        first = steps_by_torchtitan(tmp_path / f"{stop}", stop)
        second = steps_by_torchtitan(tmp_path / f"{stop}", 12)
        assert len(first) == stop and first + second == whole


def train_with_hugging_face(corpus, folder, accumulation):
    """Trains on the ranks that are there and returns the losses."""
    from examples.integrations import with_hugging_face

    plan = build_plan("patch-train", gradient_accumulation=4, **{**SIZES, "global_batch_size": 16})
    stream = TokenStream(plan, corpus, seed=SEED, split=SPLIT)
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = with_hugging_face.make_trainer(make_model("llama"), stream, accumulation, output_dir=str(folder), **quiet)
    trainer.train()
    return losses_of(trainer)


def test_two_processes_of_hugging_faces_trainer_divide_one_stream(tmp_path, corpus):
    pytest.importorskip("transformers")
    alone = train_with_hugging_face(corpus, tmp_path / "alone", 4)
    first, _ = run_ranks(train_with_hugging_face, 2, tmp_path / "logs", corpus, tmp_path / "two", 2)
    assert len(alone) == 18 and first == pytest.approx(alone, rel=1e-5)
