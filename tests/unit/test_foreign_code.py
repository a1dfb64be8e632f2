"""Templates are foreign code: whatever one does ends in one line that names it, soon and with little
memory."""

import resource
import signal
import time
from pathlib import Path

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.data import foreign_code
from rlsc_mcore.data.templates import render_prompt
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from tests.helpers.folders import EMBEDDED

HOSTILE = {
    "division": "{{ 1 / 0 }}",
    "types": "{{ 1 + 'a' }}",
    "include": "{% include 'other' %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "string": "{{ 'x' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "power": "{{ 'x' * (10 ** (10 ** 2)) }}",
    "long": "{{ 'x' * 5000000 }}",
    "raise": "{{ raise_exception('no \x1b[2J such role') }}",
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "undefined": "{{ nothing.there }}",
    "syntax": "{% if %}",
    "join": "{{ (('x' * 9999999 ) | list | join('y')) * 999 }}",
}


@pytest.mark.parametrize("kind", ["file", "chat"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(foreign_code, "SECONDS", 1.0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder(EMBEDDED))
    template = "chat"
    if kind == "chat":
        tokenizer.chat_template = HOSTILE[name]
        if name == "undefined":
            pytest.skip("transformers lets a chat template read what is not there")
    else:
        template = str(tmp_path / "mine.jinja")
        Path(template).write_text(HOSTILE[name], encoding="utf-8")
    limits, timer = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"^data\.template: ") as error:
        render_prompt(template, "1+1?", tokenizer)
    assert "\n" not in str(error.value) and time.monotonic() - begin < 60
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == (limits, timer)


def test_another_timer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    previous = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with foreign_code.foreign_code("mine"):
            pass
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *previous)
