"""The words that tell how long an answer will be: units and numbers, forms of text, phrases, kinds of task.

English, for prompts in other languages are told by their shape and their hashed words alone. `features` counts them.
"""

UNITS = {
    "words": ("word",),
    "sentences": ("sentence",),
    "paragraphs": ("paragraph", "stanza", "verse"),
    "lines": ("line",),
    "pages": ("page", "chapter", "section", "scene"),
    "characters": ("character", "letter", "char"),
    "items": (
        "item", "idea", "example", "way", "step", "tip", "point", "bullet", "bullets", "reason", "question", "name",
        "fact", "thing", "suggestion", "benefit", "option", "title", "topic", "method", "type", "advantage", "synonym",
        "difference", "recipe", "book", "movie", "song", "place", "activity", "activities", "strategies", "strategy",
        "technique", "use", "quote", "tweet", "joke", "headline", "slogan", "factor", "cause", "feature", "hashtag",
        "famous", "different", "popular", "creative", "unique", "main", "key", "possible", "potential",
    ),
}  # fmt: skip
UNIT_OF = {form: unit for unit, words in UNITS.items() for word in words for form in (word, word + "s")}
TOKENS_OF_ONE = {"words": 1.3, "sentences": 22.0, "paragraphs": 85.0, "lines": 11.0, "pages": 400.0}
"""Tokens of one unit, roughly, in the public sets (experiments/ship_lengths.py names them)."""

FORMS = {
    "haiku": 20, "slogan": 10, "headline": 14, "title": 10, "tweet": 40, "caption": 25, "limerick": 50, "quatrain": 40,
    "sonnet": 150, "poem": 170, "paragraph": 110, "summary": 90, "email": 190, "letter": 260, "essay": 550,
    "article": 550, "story": 450, "blog": 600, "speech": 450, "dialogue": 300, "recipe": 320, "outline": 300,
    "table": 150, "plan": 350, "itinerary": 400, "script": 400, "proposal": 550, "report": 550, "song": 280, "lyrics": 280,
}  # fmt: skip
"""Forms of text and roughly how many tokens one has."""

PHRASES = {
    "terse": (
        " one word ", " single word ", " 1 word ", " two words ", " yes or no ", " yes no ", " true or false ",
        " only the ", " only a ",
        " only one ", " only with ", " just the ", " just a ", " just one ", " just with ", " no explanation", " no other ",
        " no additional ", " nothing else ", " without explanation", " without any expla", " which of the ", " which of these ",
    ),
    "expansive": (
        " step by step ", " in detail ", " in great detail ", " in more detail ", " as long as ", " as much ", " as many ",
        " as detailed as ", " at least ", " minimum ", " pros and cons ", " show your work", " show the work", " explain your ",
        " explain why ", " explain how ", " for each ", " with example",
    ),
    "bound": (
        " at most ", " no more than ", " not more than ", " up to ", " less than ", " fewer than ", " under ", " within ",
        " maximum ", " limit ",
    ),
    "structured": (" json ", " csv ", " xml ", " yaml ", " markdown ", " latex ", " html ", " table ", " tables ", " bullet"),
}  # fmt: skip
"""Ways to say how an answer shall look, in text without punctuation."""

ASKING = {
    "a", "an", "about", "approximately", "around", "at", "exactly", "in", "least", "maximum", "minimum", "most", "of",
    "only", "over", "roughly", "than", "to", "under", "up", "using", "with", "within", "write",
}  # fmt: skip
"""Words before an amount that make it one of the answer ("in 200 words", "a ten line poem")."""

ASKING_ONE = {
    "in",
    "write",
    "with",
    "create",
    "compose",
    "generate",
    "as",
    "give",
    "using",
    "construct",
    "form",
    "into",
}
WHOLE = {"sentence", "paragraph", "word", "line", "page", "stanza", "verse"}

NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "dozen": 12, "twelve": 12, "fifteen": 15, "twenty": 20, "fifty": 50, "hundred": 100, "thousand": 1000,
    "single": 1, "couple": 2, "few": 3, "several": 5,
}  # fmt: skip

_CUE_WORDS = """
brief: brief briefly short concise concisely succinct shortly quick quickly tldr tl summary simple only just
long: detailed detail detailing comprehensive thorough thoroughly extensive elaborate depth long full complete
    explain
prose: essay story article blog post poem song lyrics script speech letter email report proposal novel chapter
    dialogue review
code: code function program script python java javascript c++ sql html css class algorithm api implement regex query
    bash react
list: list steps ways ideas examples tips table enumerate bullet itinerary outline plan guide
fact: who when where which whose year capital name date
how: how why explain describe discuss compare contrast analyze analyse evaluate
rework: rewrite edit correct fix paraphrase rephrase translate summarize summarise proofread convert reword change
    improve grammar replace
choose: classify identify categorize label choose select detect true false yes no sentiment option correct
compute: calculate compute solve equation sum probability find convert average integral derivative
create: write create generate compose design make develop draft build imagine roleplay pretend act
"""
CUES: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, _, words in (line.partition(":") for line in _CUE_WORDS.replace("\n    ", " ").strip().splitlines())
}
"""Words that tell what kind of answer is asked for, by kind."""

_VERBS = """
    add analyze analyse build calculate categorize choose classify compare compose compute construct convert create
    define describe design determine develop discuss draft edit estimate evaluate explain extract find generate give
    help identify implement include list make name organize outline plan predict print produce propose provide
    recommend return rewrite select show solve state suggest summarize tell translate use write
"""
VERBS = frozenset(_VERBS.split())
"""What an answer is told to do: each is one more part of the task."""

_REWORK = """
    add capitalize change complete convert correct decode delete edit encode expand fix format grammar improve insert
    modify paraphrase proofread rearrange remove reorder rephrase replace reverse revise reword rewrite simplify
    substitute transform translate
"""
_SUMMARY = "abstract gist headline main shorten summarise summarize summary tl tldr title"
_CHOOSE = """
    categorize choose classify detect determine extract false find identify label name pick rank select sentiment sort
    spam tag true which
"""
TASKS: dict[str, frozenset[str]] = {
    "rework": frozenset(_REWORK.split()),
    "summary": frozenset(_SUMMARY.split()),
    "choose": frozenset(_CHOOSE.split()),
}
"""Tasks upon a given text: an answer as long as that text, a part of it, a word or two."""
