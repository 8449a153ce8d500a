"""The languages that speech models of the Whisper family know: codes and English names.

It refuses to guess: a language is written as its code or as its English name, or it is none.
"""

_NAMES = (
    "af afrikaans|am amharic|ar arabic|as assamese|az azerbaijani|ba bashkir|be belarusian|bg bulgarian|bn bengali|"
    "bo tibetan|br breton|bs bosnian|ca catalan|cs czech|cy welsh|da danish|de german|el greek|en english|es spanish|"
    "et estonian|eu basque|fa persian|fi finnish|fo faroese|fr french|gl galician|gu gujarati|ha hausa|haw hawaiian|"
    "he hebrew|hi hindi|hr croatian|ht haitian creole|hu hungarian|hy armenian|id indonesian|is icelandic|it italian|"
    "ja japanese|jw javanese|ka georgian|kk kazakh|km khmer|kn kannada|ko korean|la latin|lb luxembourgish|ln lingala|"
    "lo lao|lt lithuanian|lv latvian|mg malagasy|mi maori|mk macedonian|ml malayalam|mn mongolian|mr marathi|ms malay|"
    "mt maltese|my myanmar|ne nepali|nl dutch|nn nynorsk|no norwegian|oc occitan|pa punjabi|pl polish|ps pashto|"
    "pt portuguese|ro romanian|ru russian|sa sanskrit|sd sindhi|si sinhala|sk slovak|sl slovenian|sn shona|so somali|"
    "sq albanian|sr serbian|su sundanese|sv swedish|sw swahili|ta tamil|te telugu|tg tajik|th thai|tk turkmen|"
    "tl tagalog|tr turkish|tt tatar|uk ukrainian|ur urdu|uz uzbek|vi vietnamese|yi yiddish|yo yoruba|yue cantonese|"
    "zh chinese"
)
LANGUAGES: dict[str, str] = {code: name for code, _, name in (each.partition(" ") for each in _NAMES.split("|"))}
_CODES = {name: code for code, name in LANGUAGES.items()} | {"jv": "jw", "burmese": "my", "mandarin": "zh"}


def code_of(written: str) -> str | None:
    """The code of a language that is written as its code or its English name; None if there is no such language."""
    small = written.lower()
    return small if small in LANGUAGES else _CODES.get(small)


def name_of(code: str | None) -> str:
    """The English name of a language as answers have it; of one that nobody knows, what it is called."""
    return "unknown" if code is None else LANGUAGES.get(code, code)
