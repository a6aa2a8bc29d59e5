"""Templates for the layout of a response: its format, length, beginning and end."""

from __future__ import annotations

from align.synth.constraint_templates.template import Template, full_text

FIRST_WORDS = ("Perhaps", "Today", "Still", "Often", "Clearly", "Imagine")
END_PHRASES = (
    *("I hope this helps.", "That is all for now.", "Let me know what you think."),
    *("Do you have any other questions?", "And that is the whole story."),
)

TEMPLATES: dict[str, tuple[Template, ...]] = {
    "combination:repeat_prompt": (
        Template(
            (
                "Before you answer, repeat the request above word for word.",
                "First copy the request above exactly as it is, and then answer it.",
            ),
            {"prompt_to_repeat": full_text},
        ),
    ),
    "combination:two_responses": (
        Template(
            (
                "Give two different responses, separated by six asterisks: ******",
                "Answer twice, in two different ways, with a line of ****** between the two answers.",
            )
        ),
    ),
    "detectable_format:constrained_response": (
        Template(
            (
                "Answer with one of these three: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
                "Reply with exactly one of the following: My answer is yes. / My answer is no. / My answer is maybe.",
            )
        ),
    ),
    "detectable_format:json_format": (
        Template(
            (
                "Give the whole answer as JSON.",
                "Format your entire output as one valid JSON value; a Markdown code block around it is fine.",
            )
        ),
    ),
    "detectable_format:multiple_sections": (
        Template(
            (
                "Divide your answer into {num_sections} sections, headed {section_spliter} 1, {section_spliter} 2 ...",
                "Give the answer {num_sections} numbered parts; begin each with {section_spliter} X, X its number.",
            ),
            {"num_sections": (2, 3), "section_spliter": ("Section", "Part", "SECTION")},
        ),
    ),
    "detectable_format:number_bullet_lists": (
        Template(
            (
                "Answer with exactly {num_bullets} bullet points, lines that begin with an asterisk: * like this",
                "Use exactly {num_bullets} Markdown bullet points (* such as this one).",
                "Your answer has {num_bullets} bullet points, no more and no fewer, and each begins with '* '.",
            ),
            {"num_bullets": (2, 3, 4)},
        ),
    ),
    "detectable_format:number_highlighted_sections": (
        Template(
            (
                "Highlight at least {num_highlights} passages with asterisks, *like this*.",
                "Mark {num_highlights} or more parts of your answer in Markdown, for example *an important part*.",
            ),
            {"num_highlights": (1, 2, 3)},
        ),
    ),
    "detectable_format:title": (
        Template(
            (
                "Give your answer a title in double angular brackets, such as <<a good day>>.",
                *("Begin with a title, wrapped in << and >>.", "Include a title of the form <<title>>."),
            )
        ),
    ),
    "length_constraints:nth_paragraph_first_word": (
        Template(
            (
                "Write {num_paragraphs} paragraphs with a blank line between them. Number {nth_paragraph} begins with "
                "the word '{first_word}'.",
                "Your answer has exactly {num_paragraphs} paragraphs, set apart by blank lines, and the first word of "
                "paragraph {nth_paragraph} is '{first_word}'.",
            ),
            {"num_paragraphs": (2, 3), "nth_paragraph": (1, 2), "first_word": FIRST_WORDS},
        ),
    ),
    "length_constraints:number_paragraphs": (
        Template(
            (
                "Write exactly {num_paragraphs} paragraphs, separated by the divider ***",
                "Your answer consists of {num_paragraphs} paragraphs; put *** between one and the next.",
            ),
            {"num_paragraphs": (2, 3)},
        ),
    ),
    "length_constraints:number_sentences": (
        Template(
            (
                "Use fewer than {num_sentences} sentences.",
                "Your answer should have less than {num_sentences} sentences.",
            ),
            {"num_sentences": (3, 4, 5), "relation": ("less than",)},
        ),
        Template(
            ("Use at least {num_sentences} sentences.", "Write {num_sentences} sentences or more."),
            {"num_sentences": (3, 4), "relation": ("at least",)},
        ),
    ),
    "length_constraints:number_words": (
        Template(
            (
                *("Use fewer than {num_words} words.", "Answer in less than {num_words} words."),
                "Keep it short: less than {num_words} words.",
            ),
            {"num_words": (20, 30, 40, 50), "relation": ("less than",)},
        ),
        Template(
            ("Use at least {num_words} words.", "Answer in {num_words} words or more."),
            {"num_words": (30, 40, 50), "relation": ("at least",)},
        ),
    ),
    "startend:end_checker": (
        Template(
            (
                "End with exactly this phrase and nothing after it: {end_phrase}",
                "The very last words of your answer must be: {end_phrase}",
            ),
            {"end_phrase": END_PHRASES},
        ),
    ),
    "startend:quotation": (
        Template(("Wrap your whole answer in double quotation marks.", "Put double quotation marks around it all.")),
    ),
}
