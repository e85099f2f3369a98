"""Which held-out documents and passages may serve as prompts and samples."""

import re

# English words that hardly occur in the other languages, and frequent words of each Latin-script language.
_FREQUENT_WORDS = {
    "english": "the of and are you for with from this that all select your",
    "german": "der die das und den dem ein eine einen sie ist wird im von zu mit für auf nicht oder",
    "french": "le la les des un une et est dans pour vous du au sur avec ou par cette que",
    "polish": "i w z na do się jest lub nie dla oraz tego przez można aby który jako po ten",
}
# Letters that a text of the language must consist of; Japanese must have kana, which Chinese has not.
_SCRIPTS = {"russian": "[\u0400-\u04ff]", "chinese": "[\u4e00-\u9fff]", "japanese": "[\u3040-\u30ff\u4e00-\u9fff]"}
_KANA = re.compile("[\u3040-\u30ff]")
_SENSITIVE = re.compile(
    r"\b(naked|undress|to bed|whor|harlot|strumpet|bawd|rape|raping|ravish|lust|fornicat|adulter|concubin|incest|"
    r"prostitut|sex|womb|copulat|breast|virgin|bastard|lewd|wanton|eunuch|circumcis|dung|piss|genital|menstru|"
    r"slave|negro|savage|squaw|heathen|jew|gyps|moor\b|infidel|lunatic|idiot|stoned|slay|slain|slew|murder|massacre|"
    r"hate|kill|blood|corpse|behead|hang(ed|ing)\b|suicid|tortur|lynch|hitler|nazi|fascis|bomb|terroris|genocid|drunk)",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(r"gutenberg|copyright|all rights reserved|e-?mail|@[a-z]+\.|http", re.IGNORECASE)


def may_be_shipped(identity: str) -> bool:
    """Whether one licence, stated for the whole package, covers the document, and its matter suits an example.

    The licence of the translated manual pages differs from page to page, and some are under the GNU FDL, as is the
    kernel's manual of its media interfaces.
    """
    return not re.search(r"^manpages-|/userspace-api/media/|lucrece|venus_and_adonis", identity)


def is_in_language(text: str, domain: str) -> bool:
    """Whether ``text`` is in the language that ``domain`` is called after; True for a domain of another kind.

    Some pages of the translated help were never translated.
    """
    if domain in _SCRIPTS:
        letters = re.findall(r"[^\W\d_]", text)
        native = re.findall(_SCRIPTS[domain], text)
        return len(native) > 0.6 * len(letters) and (bool(_KANA.search(text)) == (domain == "japanese"))
    if domain not in _FREQUENT_WORDS:
        return True
    words = re.findall(r"\w+", text.lower())
    hits = {name: sum(word in frequent.split() for word in words) for name, frequent in _FREQUENT_WORDS.items()}
    return hits[domain] >= max(3, 0.06 * len(words)) and hits[domain] > 5 * hits["english"]


def is_harmless(text: str) -> bool:
    """Whether ``text`` speaks of no sex, no violence and no group that old texts speak ill of, and has no address and
    no publisher's notice; judged by its words, so rather too strictly."""
    return not _SENSITIVE.search(text) and not _BOILERPLATE.search(text)
