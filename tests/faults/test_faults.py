"""The commands of `commands.py` under every fault: the exit code, one line that says what is wrong, nothing
half-written, and the result of an undisturbed run afterwards.

CI runs a part: each fault on one command of each group, so that each pair of a group and a fault is there. All of it:
`make test-faults`, whose table is docs/faults.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Command
from tests.faults.faulty_run import FaultInputs, FaultyRun, Outcome, wait
from tests.faults.file_check import check_complete

pytestmark = pytest.mark.slow

# The part in CI has the same moments every time, so that a change is what makes it fail; the whole matrix new ones.
SEED = int(
    os.environ.get("LAVIC_FAULTS_SEED")
    or (random.SystemRandom().randrange(10**6) if os.environ.get("LAVIC_ALL_FAULTS") else 1)
)
MOMENTS = 4
"""How often a command is killed in the whole matrix, and on how many sizes of disk it runs."""
ODD = "a b#c%20d?é"


def refused(run: FaultyRun, ended: Outcome, code: int) -> None:
    """It has said in one line what is wrong."""
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.code == code, f"{ended.code}\n{ended.stdout}{ended.stderr}"
    assert len(ended.errors) == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == ended.errors[0], ended.stderr
    assert ended.errors[0].startswith(f"lavic {run.words()[0]}: error: ")


def as_undisturbed(inputs: FaultInputs, run: FaultyRun, ended: Outcome) -> None:
    """It has ended as when nothing was in its way, and left the same."""
    expected = inputs.undisturbed(run.command)
    assert "Traceback" not in ended.stderr and not ended.errors, ended.stderr
    assert ended.code == expected.code, f"{ended.code}\n{ended.stdout}{ended.stderr}"
    if run.command.prints:
        assert run.printed(ended) == expected.stdout
    assert run.command.signature(run.folder) == expected.signature


def read_only(inputs: FaultInputs, run: FaultyRun) -> None:
    before = run.command.signature(run.folder) if run.command.result is None else {}
    ended = run.read_only()
    if run.command.prints:
        as_undisturbed(inputs, run, ended)
        return
    refused(run, ended, 2)
    if run.command.result is None:
        assert run.command.signature(run.folder) == before


def disk_full(inputs: FaultInputs, run: FaultyRun, share: float = 0.0) -> None:
    if run.command.prints:
        refused(run, run.run(stdout="/dev/full"), 1)
        return
    free = int(share * inputs.undisturbed(run.command).blocks)
    ended = run.on_a_small_disk(free)
    refused(run, ended, 1)
    check_complete(run.out)
    as_undisturbed(inputs, run, run.run())


def unreadable(inputs: FaultInputs, run: FaultyRun, name: str) -> None:
    file = only(run, name)
    file.chmod(0)
    spoilt(run, run.obeying_modes(), "input unreadable", name)


def cut(inputs: FaultInputs, run: FaultyRun, name: str) -> None:
    file = only(run, name)
    os.truncate(file, file.stat().st_size // 2)
    spoilt(run, run.run(), "input cut", name)


def spoilt(run: FaultyRun, ended: Outcome, fault: str, name: str) -> None:
    """It has refused an input and left nothing, or says what it makes of it."""
    code, said = run.command.tells.get((fault, name), (2, ""))
    if said:
        assert ended.code == code and said in ended.stdout + ended.stderr, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr and not ended.errors, ended.stderr
        return
    refused(run, ended, code)
    if run.command.keeps_work and fault == "input cut":
        assert {path.name for folder in run.out.iterdir() for path in folder.iterdir()} <= {"work", ".lock"}
    elif not run.command.copies:
        assert not list(run.out.iterdir())


def killed(inputs: FaultInputs, run: FaultyRun, share: float = 0.0) -> None:
    changes = inputs.undisturbed(run.command).changes
    if not changes:  # it writes nothing: killed when it has loaded what it needs
        process = run.start()
        process.kill()
        assert wait(process).code == -9
    else:
        ended, _ = run.killed(1 + int(share * changes))
        # A run may make fewer changes than the one that was counted, and end before its moment.
        assert ended.code in (-9, inputs.undisturbed(run.command).code), ended.stderr
    check_complete(run.out)
    as_undisturbed(inputs, run, run.run())


def twice(inputs: FaultInputs, run: FaultyRun) -> None:
    both = [wait(process) for process in [run.start(), run.start()]]
    last = [ended for ended in both if ended.code == 2 and not run.command.prints]
    assert len(last) < 2, [ended.stderr for ended in both]
    for ended in last:
        refused(run, ended, 2)
    for ended in both:
        if ended not in last:
            as_undisturbed(inputs, run, ended)


def no_home(inputs: FaultInputs, run: FaultyRun) -> None:
    ended = run.nobody_at_home()
    if run.command.name == "doctor":  # which is asked what is missing
        assert ended.code == 1 and "HOME" in ended.stdout and not ended.stderr, ended.stdout + ended.stderr
    else:
        as_undisturbed(inputs, run, ended)


def c_locale(inputs: FaultInputs, run: FaultyRun) -> None:
    env = {key: value for key, value in run.env.items() if key != "LANG"}
    ended = run.run(env={**env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    as_undisturbed(inputs, run, ended)


def odd_path(inputs: FaultInputs, run: FaultyRun) -> None:
    as_undisturbed(inputs, run, run.run())


def only(run: FaultyRun, name: str) -> Path:
    """The first file that a pattern matches."""
    return sorted(run.folder.glob(name))[0]


FAULTS: dict[str, Callable[..., None]] = {
    "OUT read-only": read_only,
    "disk full": disk_full,
    "input unreadable": unreadable,
    "input cut": cut,
    "killed": killed,
    "run twice at once": twice,
    "no HOME": no_home,
    "C locale": c_locale,
    "odd path": odd_path,
}


def rows(command: Command, fault: str) -> list[tuple[object, ...]]:
    """What is varied of one command under one fault."""
    if fault in ("input unreadable", "input cut"):
        return [(name,) for name in command.reads]
    if fault in ("disk full", "killed") and not command.prints:
        chance = random.Random(f"{SEED} {command.name} {fault}")
        return [((number + chance.random()) / MOMENTS,) for number in range(MOMENTS)]
    return [()]


def choose(everything: bool) -> Iterator[object]:
    """The rows of the matrix: all, or of each fault and each group of commands one."""
    groups: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        groups.setdefault(command.group, []).append(command)
    for number, fault in enumerate(FAULTS):
        for members in groups.values():
            able = [command for command in members if rows(command, fault)]
            for command in able if everything else [able[number % len(able)]]:
                varied = rows(command, fault)
                chosen = varied if everything else [varied[SEED % len(varied)]]
                for more in chosen:
                    label = f"{command.name}-{fault}" + "".join(
                        f"-{each:.2f}" if isinstance(each, float) else f"-{Path(str(each)).name}" for each in more
                    )
                    yield pytest.param(command, fault, more, id=label.replace(" ", "_"))


@pytest.mark.parametrize(("command", "fault", "more"), choose(bool(os.environ.get("LAVIC_ALL_FAULTS"))))
def test_fault(
    inputs: FaultInputs,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    command: Command,
    fault: str,
    more: tuple[object, ...],
) -> None:
    record_property("command", command.name)
    record_property("fault", fault)
    print(f"LAVIC_FAULTS_SEED={SEED}")
    run = inputs.prepare(command, tmp_path / (ODD if fault == "odd path" else "here"))
    FAULTS[fault](inputs, run, *more)
