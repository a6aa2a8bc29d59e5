"""A teacher whose reply is a pure function of the request, with the forms and faults of real ones.

`serving_teacher()` is an OpenAI-compatible server that answers with `ScriptedTeacher`. It recognizes the project's own
wordings. Items are made of words drawn from the hash of the request, so kills, order and concurrency change nothing.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from random import Random

from chat_server import serving

from align.inference.samples import Sample, Throughput, prompt_key, sample_seed, unique_prompts

FIRST = [
    "Alpine",
    "Binary",
    "Coastal",
    "Digital",
    "Early",
    "Folk",
    "Glacial",
    "Hidden",
    "Inner",
    "Jovian",
    "Kinetic",
    "Lunar",
]
SECOND = [
    "algebra",
    "biology",
    "cooking",
    "dialects",
    "economics",
    "forests",
    "grammar",
    "history",
    "islands",
    "jazz",
    "kites",
]
THIRD = [
    "in winter",
    "at sea",
    "for beginners",
    "of Europe",
    "under pressure",
    "after 1900",
    "by hand",
    "in cities",
    "at night",
]
QUESTIONS = [
    "How did {} shape {} {}?",
    "Explain why {} matters to {} {}.",
    "Compare {} with {} {}, and give an example.",
    'What does the phrase "{}" mean in {} {}?',
    "Suggest a plan to learn about {}; it should cover {} {}.",
]


def rng_of(request, *more):
    """Random numbers that depend on the request only."""
    return Random(hashlib.sha256(json.dumps([request, *more], sort_keys=True).encode()).digest())


def names(number, rng):
    """Distinct names of two to four words."""
    every = [f"{one} {two}" for one in FIRST for two in SECOND]
    return [f"{name} {rng.choice(THIRD)}" if rng.random() < 0.3 else name for name in rng.sample(every, number)]


def sentences(number, rng):
    """Distinct questions and requests."""
    subjects = rng.sample([f"{one.lower()} {two}" for one in FIRST for two in SECOND], number)
    return [rng.choice(QUESTIONS).format(each, rng.choice(SECOND), rng.choice(THIRD)) for each in subjects]


def numbered(mark):
    return lambda items, rng: "\n".join(f"{mark.format(place + 1)} {item}" for place, item in enumerate(items))


def joined(template, between="\n"):
    return lambda items, rng: between.join(template.format(item) for item in items)


def with_continuation(items, rng):
    """Long items over two lines, the second of which is indented."""
    lines = []
    for place, item in enumerate(items):
        words = item.split()
        half = len(words) // 2 + 1
        lines += [f"{place + 1}. {' '.join(words[:half])}", *([f"   {' '.join(words[half:])}"] if words[half:] else [])]
    return "\n".join(lines)


# Forms that a teacher gives a list, each of which holds every item
BAR = "\\|"  # in the cell of a table
FORMS = {
    "numbered": numbered("{}."),
    "numbered with brackets": numbered("{})"),
    "numbered in brackets": numbered("({})"),
    "numbered in bold": numbered("**{}.**"),
    "bold with the number": lambda items, rng: "\n".join(
        f"**{place + 1}. {each}**" for place, each in enumerate(items)
    ),
    "labelled": numbered("Item {}:"),
    "dashes": joined("- {}"),
    "asterisks": joined("* {}"),
    "dots": joined("• {}"),
    "bold bullets": joined("- **{}**"),
    "json": lambda items, rng: json.dumps(items),
    "fenced json": lambda items, rng: f"```json\n{json.dumps(items, indent=2, ensure_ascii=False)}\n```",
    "json under a key": lambda items, rng: json.dumps({"items": items}),
    "json objects": lambda items, rng: json.dumps([{"text": item, "number": 3} for item in items]),
    "fenced yaml": lambda items, rng: (
        "```yaml\n" + "\n".join(f"- {json.dumps(item, ensure_ascii=False)}" for item in items) + "\n```"
    ),
    "blank lines between": numbered("{}.")
    and (lambda items, rng: "\n\n".join(f"{n + 1}. {each}" for n, each in enumerate(items))),
    "plain lines": joined("{}"),
    "quoted": joined('- "{}"'),
    "preamble": lambda items, rng: "Sure! Here is the list you asked for:\n\n" + numbered("{}.")(items, rng),
    "closing": lambda items, rng: numbered("{}.")(items, rng) + "\n\nLet me know if you would like some more of them!",
    "both": lambda items, rng: "Certainly:\n\n" + joined("- {}")(items, rng) + "\n\nI hope this helps.",
    "windows": lambda items, rng: numbered("{}.")(items, rng).replace("\n", "\r\n"),
}
# Of the parsers' own tests
DRESSED_FORMS = {
    "table": lambda items, rng: "\n".join(
        ["Here is what I found:", "", "| # | What is asked | Level |", "|---|:---|---|"]
        + [f"| {place + 1} | {each.replace('|', BAR)} | easy |" for place, each in enumerate(items)]
    ),
    "numbered, with a closing line": lambda items, rng: numbered("{}.")(items, rng) + "\nLet me know if you need more!",
    "dashes, with a closing line": lambda items, rng: joined("- {}")(items, rng) + "\nI hope these help.",
}
NAME_FORMS = {
    "described": lambda items, rng: "\n".join(
        f"{n + 1}. **{each}**: what one should know of it." for n, each in enumerate(items)
    ),
    "described after a dash": joined("- {} – the parts that are least known"),
    "described below": lambda items, rng: "\n".join(
        f"{n + 1}. {each}\n   It has many sides." for n, each in enumerate(items)
    ),
    "commas": joined("{}", ", "),
    "commas and": lambda items, rng: f"{', '.join(items[:-1])} and {items[-1]}." if len(items) > 1 else f"{items[0]}.",
}
SENTENCE_FORMS = {
    "continuation": with_continuation,
    "question label": joined("- Question: {}"),
}
REFUSAL = "I'm sorry, but I can't help with that request."
GERMAN = [
    "Warum ist der Himmel am Abend rot, obwohl er am Mittag noch blau gewesen ist?",
    "Erkläre mir bitte, wie ein Segelboot auch gegen den Wind fahren kann.",
    "Welche Bücher sollte jemand lesen, der sich für die Geschichte der Schweiz interessiert?",
]


def fewer(items, rng):
    return numbered("{}.")(items[: max(1, len(items) - 2)], rng), "stop"


def surplus(items, rng):
    more = [f"{item} again" for item in items[:3]]
    return numbered("{}.")([*items, *more], rng), "stop"


def repeated(items, rng):
    return numbered("{}.")([items[0], items[0].upper(), *items[1:]][: len(items)], rng), "stop"


def cut(items, rng):
    text = numbered("{}.")(items, rng)
    return text[: len(text) - len(items[-1]) // 2], "length"


def cut_json(items, rng):
    text = json.dumps(items)
    return text[: len(text) - len(items[-1]) // 2 - 2], "length"


def endless(items, rng):
    return " ".join(["and then it goes on and on without an end"] * 200), "length"


# Faults: what comes back in place of a list of the items, and the finish reason
FAULTS = {
    "fewer": fewer,
    "surplus": surplus,
    "repeated": repeated,
    "cut": cut,
    "cut json": cut_json,
    "refusal": lambda items, rng: (REFUSAL, "stop"),
    "empty": lambda items, rng: ("", "stop"),
    "blank": lambda items, rng: ("\n \n", "stop"),
    "endless": endless,
    "german": lambda items, rng: (numbered("{}.")(GERMAN, rng), "stop"),
    "prose": lambda items, rng: ("There is much to be said about this. It would take a whole book to do so.", "stop"),
}


class ScriptedTeacher:
    """Answers requests with lists of names or sentences.

    `modes` maps a form or fault to its rate; of honest modes alone, each answer holds what was asked for. `told`
    collects every item of every answer, as it was meant.
    """

    def __init__(self, modes=None, *, seed=0, user_forms=("plain",), keywords=()):
        self.modes, self.seed, self.told = modes or {"numbered": 1}, seed, set()
        self.user_forms, self.keywords = user_forms, keywords
        self.asked = []  # every request, in order of arrival

    def __call__(self, request):
        """Return the text and the finish reason of an answer."""
        self.asked.append(request)
        rng = rng_of(request, self.seed)
        text = request["messages"][-1]["content"]
        for pattern, reply in REPLIES:
            if found := re.search(pattern, text, re.DOTALL):
                return reply(self, request, found, rng)
        return self.prose(rng), "stop"

    def mode(self, rng):
        return rng.choices(list(self.modes), list(self.modes.values()))[0]

    def listed(self, items, rng):
        """Return a list of the items in one of the modes."""
        self.told |= set(items)
        mode = self.mode(rng)
        if mode in FAULTS:
            return FAULTS[mode](items, rng)
        forms = {**FORMS, **NAME_FORMS, **SENTENCE_FORMS}
        return forms[mode](items, rng), "stop"

    def prose(self, rng):
        """Return an ordinary answer."""
        return " ".join(sentence.replace("?", ".") for sentence in sentences(3, rng))


def reply_names(teacher, request, found, rng):
    return teacher.listed(names(int(found[1]), rng), rng)


def reply_sentences(teacher, request, found, rng):
    return teacher.listed(sentences(int(found[1]), rng), rng)


POLITENESS = [
    "Thank you so much!",
    "That's really helpful.",
    "Great explanation!",
    "I completely agree.",
    "Thanks a lot.",
]
USER_FORMS = {  # what a teacher writes in the place of a user's turn
    "plain": lambda turn, history: turn,
    "labelled": lambda turn, history: f"User: {turn}",
    "quoted": lambda turn, history: f'"{turn}"',
    "polite": lambda turn, history: f"{POLITENESS[len(turn) % len(POLITENESS)]} {turn}",
    "both sides": lambda turn, history: f"{turn}\n\nAssistant: That is a long story.",
    "as assistant": lambda turn, history: "How can I help you today?",
    "only polite": lambda turn, history: "Thank you! That's great.",
    "repeats": lambda turn, history: re.findall(r"^User: (.+)$", history, re.MULTILINE)[0],
    "refusal": lambda turn, history: REFUSAL,
    "empty": lambda turn, history: " ",
}


def reply_turn(teacher, request, found, rng):
    (turn,) = (each.replace('"', "") for each in sentences(1, rng))
    teacher.told.add(turn)
    return USER_FORMS[rng.choice(teacher.user_forms)](turn, found[1]), "stop"


def reply_yes_no(teacher, request, found, rng):
    answer = "Yes" if any(word in teacher.keywords for word in [found[1]]) else "No"
    return rng.choice(["{}", "{}.", "**{}**", "{}, I think.", "Answer: {}"]).format(answer), "stop"


def reply_incapable(teacher, request, found, rng):
    return (REFUSAL if rng.random() < 0.8 else teacher.prose(rng)), "stop"


def reply_single(teacher, request, found, rng):
    (text,) = sentences(1, rng)
    teacher.told.add(text)
    return text, "stop"


def reply_script(teacher, request, found, rng):
    turns = [f"User: {each}\nAssistant: {teacher.prose(rng)}" for each in sentences(int(found[1]), rng)]
    return "\n".join(turns), "stop"


def reply_distractors(teacher, request, found, rng):
    places = rng.choices(range(1, 4), k=int(found[1]))
    return "\n".join(
        f"{n + 1}. [{at}] {each}" for n, (at, each) in enumerate(zip(places, sentences(len(places), rng), strict=True))
    ), "stop"


# Parts of the project's wordings -> the reply
REPLIES = [
    (r"list of (\d+) broad topics", reply_names),
    (r"into (\d+) different aspects", reply_names),
    (r"Write (\d+) questions or requests", reply_sentences),
    (r"Rewrite it in (\d+) different ways", reply_sentences),
    (r"Think of (\d+) tasks", reply_sentences),
    (r"Write (\d+) riddles", reply_sentences),
    (r"Write (\d+) different questions or tasks about the text", reply_sentences),
    (r"Write (\d+) mathematical problems", reply_sentences),
    (r"Write (\d+) programming tasks", reply_sentences),
    (r'^Is "(.*?)" a concept', reply_yes_no),
    (r"Conversation:\n(.*)\n\nWrite the user's next message", reply_turn),
    (r"Write (\d+) different requests of users", reply_sentences),
    (r"say in one or two sentences, beginning with", reply_incapable),
    (r"Write 1 request that is as similar as possible", reply_single),
    (r"Write a conversation of (\d+) turns", reply_script),
    (r"Write (\d+) messages with which the user would lead", reply_distractors),
]


CURRENT = []  # the teacher of `Engine`


class Engine:
    """An engine in this process that asks the current teacher, one request at a time."""

    def __init__(self, policy, settings, *, name):
        self.name, self.throughput = name, Throughput()

    def sample(self, prompts, settings, *, finished):
        """Yield a sample as soon as it is known."""
        for prompt in unique_prompts(prompts):
            key = prompt_key(prompt)
            for number in range(settings.num_responses):
                if (key, number) not in finished:
                    seed = sample_seed(settings, self.name, key, number)
                    messages = [{"role": each.role, "content": each.content} for each in prompt.messages]
                    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
                    limits = {"max_tokens": settings.max_new_tokens, "seed": seed}
                    text, finish = CURRENT[0]({"model": self.name, "messages": messages, **sampling, **limits})
                    yield Sample(key, number, self.name, text, len(text), finish, seed)


@contextmanager
def serving_teacher(teacher=None, *args, **kwargs):
    """A chat server that answers as the teacher does; `args` are those of `chat_server.serving`."""
    with serving(*args, answer=teacher or ScriptedTeacher(), **kwargs) as server:
        yield server
