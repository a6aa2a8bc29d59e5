"""An instructor, coder, tester and judge of the quickstart's code tasks, for Genetic-Instruct.

A task is four steps in words (`align.procedural.code`). Replies are pure functions of the request. The instructor's
mutations change one step; its crossovers take each step from one of the tasks shown. The coder writes a wrong step at
`bug_rate`; the judge passes right solutions at the rate `tpr` and wrong ones at `fpr`; the tests are right,
but for one that is not valid Python.
"""

import re

from scripted_teacher import REFUSAL, rng_of

from align.procedural.code import CHANGE, INPUTS, KEEP, RETURN, _program, _result, instruction
from align.synth.genetic.settings import HEURISTICS
from align.synth.parsing.programs import program

TABLES = (KEEP, CHANGE, CHANGE, RETURN)
# Heuristic -> the step that it replaces
PLACES = {"constraint": 2, "rarer": 0, "steps": 1, "misdirection": 2, "bounds": 3}
TASK = re.compile(r"Write Python for a list x: ([^.]+)\.", re.IGNORECASE)
HEURISTIC = {sentence: name for name, sentence in HEURISTICS.items()}


def draw_steps(rng):
    return [rng.choice(list(table)) for table in TABLES]


def worded(steps):
    return instruction({"steps": steps})


def steps_of(task):
    """The steps of a task, whatever the case of its letters."""
    return [" ".join(step.lower().split()) for step in TASK.search(task)[1].split(", ")]


def solves(task, code):
    """Whether a program returns what the steps say, on the inputs of the grammar."""
    namespace = {}
    exec(code, namespace)  # written by the coder below
    steps = steps_of(task)
    return all(namespace["solution"](list(values)) == _result(steps, values) for values in INPUTS)


def with_another(steps, place, rng):
    return [
        rng.choice([each for each in TABLES[at] if each != step]) if at == place else step
        for at, step in enumerate(steps)
    ]


# Faults of the instructor: what takes the place of a new task
COPIES = {
    "exact copy": lambda parent, new: parent.upper(),
    "near copy": lambda parent, new: f"{parent} Please.",
}
BROKEN = {
    "refusal": lambda tasks: (REFUSAL, "stop"),
    "empty": lambda tasks: ("", "stop"),
    "cut": lambda tasks: ("\n".join(marked(tasks))[:-15], "length"),
}


def marked(tasks):
    return [f"<task>\n{task}\n</task>" for task in tasks]


class ScriptedGenetics:
    """Replies to the requests of `genetic_code`; `faults` maps the names of COPIES and BROKEN to their rates."""

    def __init__(self, *, seed=0, bug_rate=0.3, tpr=0.95, fpr=0.2, faults=None, syntax_errors=0.0):
        self.seed, self.bug_rate, self.tpr, self.fpr = seed, bug_rate, tpr, fpr
        self.faults, self.syntax_errors = faults or {}, syntax_errors
        self.asked, self.judged = [], []  # requests; (is right, passes) of each judgement

    def __call__(self, request):
        """Return the text and the finish reason of an answer."""
        self.asked.append(request)
        rng = rng_of(request, self.seed)
        text = request["messages"][-1]["content"]
        for pattern, reply in REPLIES:
            if pattern in text:
                return reply(self, text, rng)
        raise AssertionError(f"an unknown request: {text}")

    def instructed(self, parent, new, rng):
        """Return the new tasks in marks, or one of the faults."""
        fault = rng.choices([*self.faults, ""], [*self.faults.values(), 1 - sum(self.faults.values())])[0]
        if fault in BROKEN:
            return BROKEN[fault](new)
        if fault in COPIES:
            new = [COPIES[fault](parent, new), *new[1:]]
        return "Here you are:\n\n" + "\n".join(marked(new)), "stop"

    def mutate(self, text, rng):
        parent = steps_of(text)
        place = PLACES[next(name for sentence, name in HEURISTIC.items() if sentence in text)]
        return self.instructed(worded(parent), [worded(with_another(parent, place, rng))], rng)

    def cross(self, text, rng):
        parents = [steps_of(each) for each in text.split("<task>")[1:-1]]
        number = int(re.search(r"Write (\d+) new programming tasks", text)[1])
        new = [[rng.choice(parents)[place] for place in range(len(TABLES))] for _ in range(number)]
        return self.instructed(worded(parents[0]), list(map(worded, new)), rng)

    def solve(self, text, rng):
        steps = steps_of(text)
        if rng.random() < self.bug_rate:
            steps = with_another(steps, rng.randrange(len(TABLES)), rng)
        code = _program(steps)
        if rng.random() < self.syntax_errors:
            code = code.replace("lambda x", "lambda x x", 1)
        return f"One step after the other.\n\n```python\nsolution = {code}\n```", "stop"

    def test(self, text, rng):
        steps = steps_of(text)
        lines = [f"assert solution({values}) == {_result(steps, values)!r}" for values in INPUTS]
        return "```python\n" + "\n".join([*lines, "assert solution(["]) + "\n```", "stop"

    def judge(self, text, rng):
        pair = text.rpartition("\nTask: ")[2]
        is_right = solves(pair, program(pair.partition("\nAnswer:\n")[2].rpartition("\nDecision:")[0]))
        passes = rng.random() < (self.tpr if is_right else self.fpr)
        self.judged.append((is_right, passes))
        return f"The steps were followed one by one.\n[[{'pass' if passes else 'fail'}]]", "stop"


# Parts of the project's wordings -> the reply
REPLIES = [
    ("Write a new task that is derived from it", ScriptedGenetics.mutate),
    ("could belong to the same collection", ScriptedGenetics.cross),
    ("Solve this programming task", ScriptedGenetics.solve),
    ("Write five tests of a Python program", ScriptedGenetics.test),
    ("You decide whether an answer solves", ScriptedGenetics.judge),
]
