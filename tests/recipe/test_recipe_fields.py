"""Every field says what it takes: a wrong value is named with what it got and what is allowed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from qlora_kit.adapters.settings import SETTINGS
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.task_settings import TASKS

SMALL: dict[str, Any] = {
    "run": {"name": "small"},
    "base": {"model": "folder/model"},
    "data": {"train": "rows.jsonl"},
    "train": {"max_steps": 10},
}


def with_values(*changes: tuple[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(SMALL)
    for dotted, value in changes:
        section, key = dotted.split(".")
        tree.setdefault(section, {})[key] = value
    return tree


def message_of(*changes: tuple[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(with_values(*changes), "small.yaml")
    return str(caught.value)


# One case a field and kind of mistake: field, value, what the message must say besides the field.
WRONG = [
    ("run.name", 5, r"got 5 \(int\); input should be text: write it in quotes, '5'"),
    ("run.name", "", "at least 1 character"),
    ("run.name", "a/b", "should match pattern"),
    ("run.name", "../up", "should match pattern"),
    ("run.name", "x" * 101, "at most 100 characters"),
    ("run.seed", -1, "greater than or equal to 0"),
    ("run.seed", 2**31, "less than 2147483648"),
    ("run.seed", 1.5, "valid integer"),
    ("run.seed", True, r"\(bool\).*valid integer"),
    ("run.out_dir", None, r"got None \(NoneType\)"),
    ("base.model", "", "at least 1 character"),
    ("base.quant", "int3", "'nf4', 'fp4', 'int8', 'int4' or 'none'"),
    ("base.block_size", 16, "32, 64 or 128"),
    ("base.int4_algorithm", "gptq", "'rtn' or 'hqq'"),
    ("base.double_quant", "yes", "valid boolean"),
    ("base.compute_dtype", "float16", "'bf16', 'fp16' or 'fp32'"),
    ("base.trust_remote_code", 1, "valid boolean"),
    ("adapter.method", "ia3", "allowed: lora, dora"),
    ("adapter.rank", 0, "greater than or equal to 1"),
    ("adapter.rank", 1025, "less than or equal to 1024"),
    ("adapter.rank", "16", r"got '16' \(str\).*valid integer"),
    ("adapter.alpha", 0, "greater than 0"),
    ("adapter.alpha", float("inf"), "finite number"),
    ("adapter.dropout", 1.0, "less than 1"),
    ("adapter.growth", {"at": 0.5, "rank": 32}, "valid list"),
    ("adapter.growth", [{"at": 0.5, "rank": 8}], "must rise in `at` and in `rank`, from rank 16 on"),
    ("adapter.init_from", "", "at least 1 character"),
    ("adapter.init_optimizer", True, "needs init_from"),
    ("adapter.bias", True, "'none', 'lora_only' or 'all'"),
    ("adapter.target_modules", 5, "text or a list"),
    ("adapter.target_modules", ["q_proj", 5], "input should be text"),
    ("adapter.modules_to_save", "lm_head", "valid list"),
    ("adapter.new_tokens", [""], "at least 1 character"),
    ("adapter.dtype", "fp16", "'bf16' or 'fp32'"),
    ("data.train", {"path": "a"}, "text or a list"),
    ("data.train", [], "at least 1 item"),
    ("data.train", "", "at least 1 character"),
    ("data.eval_fraction", 0.5, "less than 0.5"),
    ("data.columns", {"prompt": 1}, "input should be text"),
    ("data.max_seq_len", 7, "greater than or equal to 8"),
    ("data.overlong", "drop", "'error', 'skip' or 'truncate'"),
    ("data.bad_rows", None, "'error' or 'skip'"),
    ("data.train_on", "user", "'assistant' or 'all'"),
    ("data.schema", "chatml", "'text', 'prompt_completion', 'alpaca', 'messages' or 'sharegpt'"),
    ("data.packing", True, "packing is not available yet; leave it out"),
    ("data.shuffle_buffer", 0, "greater than or equal to 1"),
    ("train.optimizer", "sgd", "'adamw'.*'paged_adamw_8bit'"),
    ("train.lr", "2e-4", r"got '2e-4' \(str\).*valid number"),
    ("train.lr", 0, "greater than 0"),
    ("train.lr", float("nan"), "finite number|greater than 0"),
    ("train.lr", "nan", r"got 'nan' \(str\); numbers must be finite"),
    ("train.lr", "-Inf", "numbers must be finite"),
    ("train.max_steps", "inf", "numbers must be finite"),
    ("adapter.alpha", "infinity", "numbers must be finite"),
    ("train.betas", [0.9], "at least 2 items"),
    ("train.betas", [0.9, 1.0], "less than 1"),
    ("train.schedule", "cos", "'constant', 'linear' or 'cosine'"),
    ("train.warmup_steps", -1, "greater than or equal to 0"),
    ("train.micro_batch_size", 2.0, "valid integer"),
    ("train.max_steps", 0, "greater than or equal to 1"),
    ("train.max_grad_norm", 0, "greater than 0"),
    ("train.trackers", ["mlflow"], "'tensorboard' or 'wandb'"),
    ("train.threads", 0, "greater than or equal to 1"),
    ("eval.answer", "regex", "'none', 'choices', 'number', 'exact' or 'text'"),
    ("eval.max_rows", 0, "greater than or equal to 1"),
    ("eval.samples", 51, "less than or equal to 50"),
    ("eval.dtype", "bf16", "'fp32' or 'compute'"),
    ("export.profiles", [], "at least 1 item"),
    ("export.profiles", ["fp16"], "'fp32'.*'int8'"),
    ("export.verify_prompts", 1, "greater than or equal to 2"),
    ("export.verify_prompts", 1001, "less than or equal to 1000"),
]


@pytest.mark.parametrize("field, value, words", WRONG, ids=[f"{f}={v!r:.20}" for f, v, _ in WRONG])
def test_a_wrong_value_is_named(field: str, value: Any, words: str) -> None:
    head, line, _ = message_of((field, value)).split("\n", 2)
    assert head == "small.yaml: 1 wrong field:"
    assert re.match(rf"  {re.escape(field)}(\.\w+)*: got ", line) and re.search(words, line), line


@pytest.mark.parametrize(
    "changes, words",
    [
        ([("adapter.method", "pissa"), ("adapter.niter", -1)], r"adapter\.niter.*greater than or equal to 0"),
        ([("adapter.method", "loftq"), ("adapter.iterations", 0)], r"adapter\.iterations.*greater than or equal to 1"),
        ([("adapter.method", "adalora"), ("adapter.init_rank", 8)], "init_rank 8 is less than rank 16"),
        ([("adapter.method", "adalora"), ("adapter.warmup_share", 0.6)], "leave no step for pruning: give shares"),
        ([("adapter.method", "adalora"), ("adapter.beta1", 1.0)], r"adapter\.beta1.*less than 1"),
        ([("adapter.method", "adalora"), ("adapter.use_rslora", True)], r"adapter\.use_rslora: unknown key"),
        ([("adapter.method", "sora"), ("adapter.sparse_lambda", -1)], r"adapter\.sparse_lambda.*equal to 0"),
        ([("adapter.method", "bottleneck"), ("adapter.reduction_factor", 0)], "greater than or equal to 1"),
        ([("adapter.method", "bottleneck"), ("adapter.activation", "swish")], "'relu', 'gelu', 'silu' or 'tanh'"),
        ([("adapter.method", "prompt_tuning"), ("adapter.tokens", 0)], "greater than or equal to 1"),
        ([("adapter.method", "prompt_tuning"), ("adapter.init", "text")], "init_text and init: text go together"),
        ([("adapter.method", "prompt_tuning"), ("adapter.init_text", "a")], "init_text and init: text go together"),
        ([("adapter.method", "bitfit"), ("adapter.bias", "all")], r"adapter\.bias: unknown key"),
        ([("adapter.method", "full")], r"full needs base\.quant: none \(got nf4; codes cannot be trained\)"),
        (
            [("adapter.method", "full"), ("base.quant", "none"), ("adapter.modules_to_save", ["norm"])],
            "full trains and saves every module; leave it out",
        ),
        ([("base.block_size", 64)], r"base\.block_size needs base\.quant: int4 \(got nf4\)"),
        (
            [("base.quant", "int8"), ("base.int4_algorithm", "rtn")],
            r"base\.int4_algorithm needs base\.quant: int4 \(got int8\)",
        ),
        ([("adapter.method", "qa_lora")], r"qa_lora needs base\.quant: int4 \(got nf4; elsewhere no blocks"),
        (
            [("adapter.method", "qa_lora"), ("base.quant", "int4"), ("base.block_size", 64)],
            r"adapter\.group_size 32 must be a multiple of base\.block_size 64",
        ),
        ([("train.max_steps", None)], "exactly one of max_steps and epochs"),
        ([("train.epochs", 1)], "exactly one of max_steps and epochs"),
        ([("data.streaming", True)], r"data\.streaming needs train\.max_steps and data\.eval"),
        (
            [("train.warmup_steps", 11)],
            r"warmup_steps 11 is more than max_steps 10: set train\.warmup_steps to 10 at most",
        ),
        ([("train.early_stopping_patience", 2)], r"needs train\.eval_every"),
        ([("eval.choices", ["a", "b"])], r"eval\.choices needs eval\.answer: choices"),
        ([("eval.answer", "choices"), ("eval.choices", ["a", "a"])], "at least two, each once"),
        ([("eval.answer", "choices"), ("eval.choices", ["a"])], "at least two, each once"),
    ],
)
def test_fields_that_disagree(changes: list[tuple[str, Any]], words: str) -> None:
    assert re.search(words, message_of(*changes))


def test_all_mistakes_are_told_at_once() -> None:
    tree = with_values(("run.seed", -1), ("adapter.rank", "a"), ("train.learning_rate", 1), ("base.quant", "gptq"))
    del tree["data"]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree)
    message = str(caught.value)
    assert "5 wrong fields" in message
    for words in ("run.seed: got -1", "adapter.rank: got 'a'", "train.learning_rate", "base.quant", "data: missing"):
        assert words in message


def test_all_disagreements_are_told_at_once() -> None:
    message = message_of(("train.epochs", 1), ("train.warmup_steps", 99), ("eval.choices", ["a"]))
    assert "4 wrong fields" in message and "exactly one" in message and "warmup_steps 99" in message


@pytest.mark.parametrize(
    "field, hint",
    [
        ("adapter.rnk", "did you mean rank?"),
        ("adapter.lora_alpha", "did you mean alpha?"),
        ("train.foo", "allowed: optimizer, lr"),
        ("trian.lr", "did you mean train?"),
        ("data.schema_", "did you mean schema?"),
    ],
)
def test_unknown_keys_get_a_hint(field: str, hint: str) -> None:
    assert hint in message_of((field, 1))


def test_unknown_keys_of_a_source_get_a_hint() -> None:
    message = message_of(("data.train", [{"path": "a", "wieght": 1}]))
    assert "data.train.0.wieght: unknown key" in message and "did you mean weight?" in message


@pytest.mark.parametrize("task", ["classification", "tagging", "image_classification"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], r"task\.labels: got \['a'\]; give at least two, each once"),
        (["a", "a", "b"], r"task\.labels: got \['a', 'a', 'b'\]; give at least two, each once"),
        ([" a", "a"], r"task\.labels: got \[' a', 'a'\]; give names without white space around them"),
        (["a", " "], r"give names without white space around them"),
    ],
)
def test_labels_of_a_task(task: str, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[task].model_validate({"labels": labels})
    assert TASKS[task].model_validate({"labels": ["b", "a"]} | ({"scheme": "plain"} if task == "tagging" else {}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["O", "O"], r"give at least two, each once"),
        (["O"], r"give at least two, each once"),
        (["PER", "LOC"], r"PER, LOC are no BIO tags; give O, B-TYPE and I-TYPE, or with task\.scheme: plain any names"),
        (["O", "B-"], r"B- are no BIO tags"),
        (["O", "B-PER"], r"task\.labels lacks I-PER; give O, and both B-TYPE and I-TYPE of each type"),
        (["B-PER", "I-PER", "I-LOC"], r"task\.labels lacks B-LOC, O; give O"),
    ],
)
def test_bio_labels(labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS["tagging"].model_validate({"labels": labels})


def test_every_field_is_described() -> None:
    unions = ("adapter", "task")
    sections: list[Any] = [field.annotation for name, field in Recipe.model_fields.items() if name not in unions]
    for section in [*sections, *SETTINGS.values(), *TASKS.values()]:
        for name, inner in section.model_fields.items():
            if (section, name) not in {("run", "name")}:
                assert inner.description, f"{section}.{name} has no docstring"
