"""Strategies in whole cells: their hooks are called, their runs are recorded, scored again and merged."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lyapft import cell
from lyapft.errors import InputError
from lyapft.module import FineTuner
from lyapft.peft import FullFineTuning
from lyapft.peft.__main__ import main
from tests.test_cell import prepared
from tests.test_module import Bigram, batch, fit, trainer_settings


class Hooked(FullFineTuning):
    """Counts what the module asks of a strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.gradients = True

    def penalty(self) -> torch.Tensor:
        return torch.tensor(2.0, requires_grad=True)

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        self.gradients &= self.table.weight.grad is not None


def test_the_module_calls_its_strategy_on_steps_that_were_taken() -> None:
    strategy, model = Hooked(), Bigram()
    strategy.table = model.table
    module = FineTuner(model, trainer_settings(), learning_rate=0.1, strategy=strategy)
    expected = module.loss(batch(0)).item()
    assert module.training_step(batch(0), 0).item() == pytest.approx(expected + 2.0)
    assert module.observed["loss"] == pytest.approx(expected)  # the record keeps the loss of the task
    fit(module, [batch(0), batch(1, poisoned=True), batch(2), batch(3)])
    assert strategy.steps == [1, 2, 3]
    assert strategy.gradients


@pytest.mark.parametrize("method", ["adalora", "sdt", "state_offset"])
def test_methods_that_need_more_than_a_loss_run_as_cells(method: str, tmp_path: Path, capsys) -> None:
    one = prepared(tmp_path, f"peft={method}", "reference=off", "trainer.steps=5")
    record = cell.ensure(one)
    assert record["status"] == "ok", record["error"]
    assert record["peft"]["proven_alive"]
    assert record["peft"]["method"] == record["choices"]["peft"] == method
    if method == "adalora":
        assert 0 < sum(record["peft"]["ranks"].values()) <= 8 * len(record["peft"]["ranks"])
    if method == "sdt":
        assert all(len(channels) == 19 for channels in record["peft"]["selected"].values())  # a tenth of 192
    target = tmp_path / "merged"
    if method == "state_offset":
        assert main(["merge", str(one.folder), str(target)]) == 2
        assert "cannot be merged: the output gains C_t h'" in capsys.readouterr().err
        return
    assert main(["merge", str(one.folder), str(target)]) == 0
    model = AutoModelForCausalLM.from_pretrained(target)
    assert not any("lora" in name or "parametrizations" in name for name, _ in model.named_parameters())
    assert (target / "tokenizer.json").is_file()
    assert main(["merge", str(one.folder), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["initial_state", "state_offset", "sdt", "bitfit"])
def test_methods_without_their_object_are_refused_before_any_work(method: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"peft={method}.*llama model has no"):
        prepared(tmp_path, f"peft={method}", "model=llama_tiny", "reference=off", "trainer.learning_rate=0.01")
    assert not list(tmp_path.iterdir())
