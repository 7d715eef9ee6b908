"""Real speech for LEAF from the Asterisk telephone prompts: spoken questions and speech
translation.

    apt-get install asterisk-core-sounds-{en,fr,es,it,ru}-wav asterisk-core-sounds-{en,fr,es}
    python -m corpora.asterisk --out data/asterisk

Studio recordings of single words (numbers, days, months, letters) in five languages, one voice
each, are strung into utterances of about 1.5 to 5 seconds: a few hundred recordings, but thousands
of combinations, so a small model can learn them from scratch and still has to listen. The folder
gets {train,validation,test}.jsonl, README.md and audio/*.flac (16 kHz mono). Of the rows, 45% ask
about English speech, 45% ask for the English translation of French, Spanish, Italian or Russian,
and 10% are whole recorded sentences (en, fr, es) to be written down.

Every composed answer has words that must be heard (`slots`) and words that are a matter of taste:
determiner, noun, verb, order. In `target`, which supervised training teaches, taste is drawn at
random nine times in ten; in `reference`, which the reward compares with, it is a fixed function of
what was heard. A supervised model learns to hear and to speak, but not which wording is rewarded:
that is left for reinforcement learning.

Held out: a composed content (Tuesday, March, third) lies in one split only, whatever its language;
a recorded sentence lies in one split only, together with every other recording of the same words.
"""

import argparse
import functools
import gzip
import hashlib
import re
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from corpora import SPLITS, new_corpus

SAMPLE_RATE = 16000  # Hz, of what is written
SOURCE_RATE = 8000  # Hz, of the packages' recordings
# Share of all contents that only this split may use.
HELD_OUT = {"test": 0.14, "validation": 0.07}
VOICES = {
    "en": "en_US_f_Allison",
    "fr": "fr_CA_f_June",
    "es": "es_MX_f_Allison",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
NAMES = {"en": "English", "fr": "French", "es": "Spanish", "it": "Italian", "ru": "Russian"}
# Languages whose recorded sentences are used.
TRANSCRIBED = ("en", "fr", "es")
TRANSCRIPT = "asterisk-core-sounds-{0}/core-sounds-{0}.txt.gz"

# Rows per group, in percent: 45 of English questions, 45 of translation, 10 of recorded sentences.
MIX = {
    "en-date": 9,
    "en-time": 9,
    "en-number": 9,
    "en-spelling": 9,
    "en-sequence-question": 9,
    **{f"{name}-{kind}": 45 / 8 for name in ("fr", "es", "it", "ru") for kind in ("date", "time")},
    "prompts-en": 4,
    "prompts-fr": 3,
    "prompts-es": 3,
}

# --------------------------------------------------------------------------------------------------
# What the recordings say
#
# Files are named alike in all languages: digits/day-0 is Sunday, digits/mon-0 January. One small
# alphabet (a-z, space, apostrophe) serves the CTC head for all five languages: accents are dropped
# and Russian is transliterated, since 32 more letters for a tenth of the rows would mostly go
# untrained. A hyphen stands for a space. All entries were checked against the packages' own
# transcripts. Numbers are kept to single recordings, as each language joins them in its way (vingt
# et un, veintiuno, ventuno): dates stop at the 20th, hours are 2 to 12 (one o'clock inflects),
# minutes these.

MINUTES = (15, 20, 30, 40, 50)

WORDS = {
    "en": {
        "days": "sunday monday tuesday wednesday thursday friday saturday",
        "months":
            "january february march april may june july august september october november december",
        "numbers":
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty",
        "ordinals":
            "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
            "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth",
        "tens": "thirty forty fifty sixty seventy eighty ninety",
        "today": "today", "tomorrow": "tomorrow", "yesterday": "yesterday", "hundred": "hundred",
    },
    "fr": {
        "days": "dimanche lundi mardi mercredi jeudi vendredi samedi",
        "months":
            "janvier fevrier mars avril mai juin juillet aout septembre octobre novembre decembre",
        "numbers":
            "zero un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze "
            "quinze seize dix-sept dix-huit dix-neuf vingt",
        "ordinals": "premier",
        "tens": "trente quarante cinquante",
        "today": "aujourd'hui", "tomorrow": "demain", "at": "a", "oclock": "heures",
    },
    "es": {
        "days": "domingo lunes martes miercoles jueves viernes sabado",
        "months":
            "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
            "diciembre",
        "numbers":
            "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce "
            "quince dieciseis diecisiete dieciocho diecinueve veinte",
        "ordinals": "primero",
        "tens": "treinta cuarenta cincuenta",
        "today": "hoy", "tomorrow": "manana", "at": "a-las", "and": "y", "es-de": "de",
    },
    "it": {
        "days": "domenica lunedi martedi mercoledi giovedi venerdi sabato",
        "months":
            "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre "
            "dicembre",
        "numbers":
            "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici "
            "quattordici quindici sedici diciassette diciotto diciannove venti",
        "ordinals": "primo",
        "tens": "trenta quaranta cinquanta",
        "today": "oggi", "tomorrow": "domani", "at": "alle", "e": "e",
    },
    # Months are recorded in the genitive, as dates need them, but ordinals in the masculine, not
    # the neuter.
    "ru": {
        "days": "voskresenye ponedelnik vtornik sreda chetverg pyatnitsa subbota",
        "months":
            "yanvarya fevralya marta aprelya maya iyunya iyulya avgusta sentyabrya oktyabrya "
            "noyabrya dekabrya",
        "numbers":
            "nol odin dva tri chetyre pyat shest sem vosem devyat desyat odinnadtsat dvenadtsat "
            "trinadtsat chetyrnadtsat pyatnadtsat shestnadtsat semnadtsat vosemnadtsat "
            "devyatnadtsat dvadtsat",
        "ordinals":
            "pervy vtoroy trety chetvyorty pyaty shestoy sedmoy vosmoy devyaty desyaty "
            "odinnadtsaty dvenadtsaty trinadtsaty chetyrnadtsaty pyatnadtsaty shestnadtsaty "
            "semnadtsaty vosemnadtsaty devyatnadtsaty dvadtsaty",
        "tens": "tridtsat sorok pyatdesyat",
        "today": "segodnya", "tomorrow": "zavtra",
    },
}  # fmt: skip
PHONETIC = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november "
    "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
# Sentences whose recording is not what its transcript says: both stop after the first of two
# sentences.
UNFAITHFUL = {("fr", "vm-mismatch"), ("es", "vm-mismatch")}


def lexicon(language):
    """{recording: the words it says}; a recording is a file's path below the voice's folder,
    without .wav."""
    words = {}
    for key, text in WORDS[language].items():
        words[key] = [word.replace("-", " ") for word in text.split()]
    table = {f"digits/{10 * i}": word for i, word in enumerate(words.pop("tens"), 3)}
    for series, prefix, first in (
        ("days", "day-", 0),
        ("months", "mon-", 0),
        ("numbers", "", 0),
        ("ordinals", "h-", 1),
    ):
        table |= {f"digits/{prefix}{i}": word for i, word in enumerate(words.pop(series), first)}
    table |= {f"digits/{name}": word for name, (word,) in words.items()}
    if language == "en":
        table |= {f"letters/{word[0]}": word[0] for word in PHONETIC}
        table |= {f"phonetic/{word[0]}_p": word for word in PHONETIC}
    return table


LEXICON = {language: lexicon(language) for language in VOICES}


def english(name):
    """The English word of a recording below digits/: "mon-2" -> "march", 7 -> "seven"."""
    return LEXICON["en"][f"digits/{name}"]


# --------------------------------------------------------------------------------------------------
# Tasks
#
# A content is a tuple of names and numbers. tell_KIND gives the recordings that speak it in a
# language (a bare name is below digits/), the English words that must be heard, by field, and the
# answer. say(key, *options) is a matter of taste (see `wording`); keys come from the content, so
# the rewarded wording can be learnt by listening.

DAYS = [f"day-{i}" for i in range(7)]
WHEN = {day: f"on {english(day).capitalize()}" for day in DAYS}
WHEN |= {day: day for day in ("today", "tomorrow", "yesterday")}
LETTERS = [word[0] for word in PHONETIC]
# For names: consonants whose letter names sound unlike.
CONSONANTS = list("bjklmrsw")
VOWELS = list("aeiou")


def wording(rng=None):
    """say(key, *options) -> one option: number key mod n in a reference (no rng); in a target 9 in
    10 are random."""

    def say(key, *options):
        if rng is None or rng.random() < 0.1:
            return options[key % len(options)]
        return options[rng.integers(len(options))]

    return say


def draw(kind, rng):
    """A random content of a kind."""
    # Weekday, month, day of the month.
    if kind == "date":
        return int(rng.integers(7)), int(rng.integers(12)), int(rng.integers(1, 21))
    # Day, hour, minute.
    if kind == "time":
        day = str(rng.choice([*DAYS, "today", "tomorrow"]))
        return day, int(rng.integers(2, 13)), int(rng.choice(MINUTES))
    # Day, hundreds, tens, unit; hundreds and unit unlike, so that no word comes twice.
    if kind == "number":
        hundreds, unit = rng.choice(range(2, 10), 2, replace=False).tolist()
        day = str(rng.choice([*DAYS, "today", "yesterday"]))
        return day, hundreds, 10 * int(rng.integers(2, 10)), unit
    # What is asked, four numbers.
    if kind == "sequence":
        asked = str(rng.choice(["reverse", "ends"]))
        return asked, *rng.choice(13, 4, replace=False).tolist()
    # Spelling by code words: any four letters.
    if rng.random() < 0.5:
        return "phonetic", "".join(rng.choice(LETTERS, 4, replace=False))
    # Or by letters: a name like komu.
    consonants = rng.choice(CONSONANTS, 2, replace=False)
    vowels = rng.choice(VOWELS, 2, replace=False)
    return "letters", f"{consonants[0]}{vowels[0]}{consonants[1]}{vowels[1]}"


def tell_date(content, language, say):
    day, month, number = content
    # "le premier", but "le deux".
    nth = f"h-{number}" if number == 1 or language in ("en", "ru") else f"{number}"
    spoken = [nth, f"mon-{month}"]
    if language == "en":
        spoken = [f"mon-{month}", nth]
    elif language == "es":
        spoken = [nth, "es-de", f"mon-{month}"]
    weekday = english(f"day-{day}")
    name = english(f"mon-{month}").capitalize()
    ordinal = english(f"h-{number}")
    event = say(day, "the", "our", "their") + " " + say(month, "meeting", "visit", "delivery")
    verb = say(number // 2, "is planned for", "falls on", "takes place on")
    date = say(number, f"{name} {ordinal}", f"the {ordinal} of {name}")
    answer = f"{event} {verb} {weekday.capitalize()}, {date}."
    slots = {"day": weekday, "month": name.lower(), "ordinal": ordinal}
    return [f"day-{day}", *spoken], slots, answer


def tell_time(content, language, say):
    day, hour, minute = content
    between = {"fr": "oclock", "es": "and", "it": "e"}
    spoken = [day, hour, minute]
    if language in between:
        spoken = [day, "at", hour, between[language], minute]
    key = list(WHEN).index(day)
    hour_word = english(hour)
    minute_word = english(minute)
    vehicle = say(key, "the", "our", "their") + " " + say(hour, "train", "bus", "ferry")
    verb = say(minute // 5, "leaves", "departs", "sets off")
    past = f"at {minute_word} minutes past {hour_word}"
    clock = say(hour // 3, f"at {hour_word} {minute_word}", past)
    what = f"{vehicle} {verb} {clock}"
    answer = say(key // 3, f"{what} {WHEN[day]}.", f"{WHEN[day]} {what}.")
    return spoken, {"day": english(day), "hour": hour_word, "minute": minute_word}, answer


def tell_number(content, language, say):
    day, hundreds, tens, unit = content
    place = say(hundreds, "the shop", "our museum", "their hotel")
    verb = say(tens // 10, "counted", "welcomed", "received")
    digits = [english(n) for n in (hundreds, tens, unit)]
    count = f"{digits[0]} hundred {say(unit, '', 'and ')}{digits[1]} {digits[2]}"
    what = f"{place} {verb} {count} {say(unit // 2, 'visitors', 'guests', 'people')}"
    answer = say(list(WHEN).index(day), f"{what} {WHEN[day]}.", f"{WHEN[day]} {what}.")
    slots = {"day": english(day)} | dict(zip(("hundreds", "tens", "unit"), digits))
    return [day, hundreds, "hundred", tens, unit], slots, answer


def tell_spelling(content, language, say):
    alphabet, letters = content
    a, b, c, d = letters.upper()
    noun = say(ord(a), "the", "our", "their") + " " + say(ord(b), "name", "code", "password")
    verb = say(ord(c), "is spelled", "is written", "reads")
    spelled = say(ord(d), f"{a} {b} {c} {d}", f"{a}, {b}, {c} and {d}")
    pattern = "letters/{}" if alphabet == "letters" else "phonetic/{}_p"
    spoken = [pattern.format(letter) for letter in letters]
    slots = {f"letter {place}": letter for place, letter in enumerate(letters, start=1)}
    return spoken, slots, f"{noun} {verb} {spelled}."


def tell_sequence(content, language, say):
    question, a, b, c, d = content
    words = [english(n) for n in (a, b, c, d)]
    first, second, third, last = words
    if question == "reverse":
        start = say(d, "backwards", "in reverse", "from the end")
        noun = say(c, "the numbers", "the figures", "they")
        verb = say(b, "are", "read", "run")
        link = say(a, "and", "then")
        answer = f"{start} {noun} {verb} {last}, {third}, {second} {link} {first}."
        slots = {f"number {place}": word for place, word in enumerate(words, start=1)}
        return [a, b, c, d], slots, answer
    noun = say(a, "number", "figure", "value")
    verb = say(d, "is", "was")
    end = say(d // 2, "the last", "the final") + say(a // 3, "", f" {noun}")
    answer = f"the first {noun} {verb} {first} and {end} {verb} {last}."
    return [a, b, c, d], {"number 1": first, "number 4": last}, answer


TELL = {
    "date": tell_date,
    "time": tell_time,
    "number": tell_number,
    "spelling": tell_spelling,
    "sequence": tell_sequence,
}
QUESTIONS = {
    "date": ("Which date is given?", "What day is that? Give the full date."),
    "time": ("When is the departure?", "At what time and on which day is it?"),
    "number": ("How many came, and when?", "What was the count, and on which day?"),
    "spelling": ("Which letters are spelled?", "Write down the letters that are spelled."),
    "reverse": ("Say the numbers backwards.", "What are the numbers in reverse order?"),
    "ends": ("Which number comes first and which last?", "Name the first and the last number."),
    "translate": (
        "Translate the {} speech into English.",
        "What does the {} speech say in English?",
    ),
    "transcribe": ("Write down the {} recording.", "What is said, word for word, in {}?"),
}


def question(task, language, rng):
    return "<|audio|>" + QUESTIONS[task][rng.integers(2)].format(NAMES[language])


def split_at(x):
    """The split that owns the point x in [0, 1)."""
    if x < HELD_OUT["test"]:
        return "test"
    return "validation" if x < sum(HELD_OUT.values()) else "train"


def split_of(content, seed):
    """The one split that may use a content: a hash decides, so neither sizes nor groups move it."""
    digest = hashlib.sha256(f"{seed} {content}".encode()).digest()
    return split_at(int.from_bytes(digest[:8], "big") / 2**64)


def compose(group, split, seed, rng, seen):
    """One composed row, still without audio, and its recordings; a `seen` content only where others
    are rare."""
    language, kind = group.split("-")[:2]
    for attempt in range(10000):
        content = draw(kind, rng)
        # Another question or alphabet is not another content.
        said = content[1:] if kind in ("sequence", "spelling") else content
        if split_of((kind, said), seed) == split and (said not in seen or attempt > 200):
            break
    assert split_of((kind, said), seed) == split, f"no content for {group} in {split}"
    seen.add(said)
    names, slots, reference = TELL[kind](content, language, wording())
    _, _, target = TELL[kind](content, language, wording(rng))
    names = [name if "/" in str(name) else f"digits/{name}" for name in names]
    task = kind
    if language != "en":
        task = "translate"
    elif kind == "sequence":
        task = content[0]
    row = {
        "prompt": question(task, language, rng),
        "reference": reference[0].upper() + reference[1:],
        "target": target[0].upper() + target[1:],
        "transcript": " ".join(LEXICON[language][name] for name in names),
        "slots": slots,
        "group": group,
    }
    return row, names


# --------------------------------------------------------------------------------------------------
# Whole recorded sentences


def plain(text):
    """Lower case, accents dropped, nothing but a-z, space and apostrophe: the alphabet of
    `transcript`."""
    text = unicodedata.normalize("NFD", text.lower().replace("’", "'").replace("œ", "oe"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z']+", " ", text).split())


def read_prompts(path, language):
    """[(recording, text)] from a package's transcripts: gzipped lines "name: text". Single digits
    become words.

    Left out: the single words above, lines without text, tones and remarks (in brackets), symbols
    and abbreviations (their spelling does not say how they are read), and what is known to be
    wrong.
    """
    others = (";", "digits/", "letters/", "phonetic/", "silence/", "spy-")
    prompts = []
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, text = line.strip().partition(":")
            text = " ".join(re.sub(r'\.\.\.|["“”]', " ", text).split())
            text = re.sub(r"\b\d\b", lambda digit: LEXICON[language][f"digits/{digit[0]}"], text)
            skipped = name.startswith(others) or (language, name) in UNFAITHFUL
            odd = re.search(r"[][()<>*#@\d\ufffd]|[A-Z]{2}|www", text)
            if plain(text) and not (skipped or odd):
                prompts.append((name, text))
    return prompts


# --------------------------------------------------------------------------------------------------
# Audio


@functools.cache
def load(path, floor_db=35.0, margin=0.02, loudness_db=-26.0):
    """A recording, float32 at 8 kHz: edges `floor_db` below the loudest 10 ms cut to `margin` s,
    RMS `loudness_db`."""
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == SOURCE_RATE and samples.ndim == 1, f"{path}: expected {SOURCE_RATE} Hz mono"
    frame = rate // 100
    pad = round(margin * rate)
    whole = samples[: len(samples) // frame * frame]
    energy = np.square(whole).reshape(-1, frame).mean(1)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-floor_db / 10))
    start = max(0, loud[0] * frame - pad)
    end = (loud[-1] + 1) * frame + pad
    samples = samples[start:end]
    return samples * (10 ** (loudness_db / 20) / np.sqrt(np.mean(samples**2)))


def resample(samples, rate):
    """`samples` at `rate` Hz -> 16 kHz."""
    try:
        import torch
        from torchaudio.functional import resample as torchaudio_resample
    except (ImportError, OSError) as error:
        # OSError: torchaudio built for another CUDA than torch.
        fix = "pip install 'torch>=2.11,<2.15' torchaudio==2.11.0"
        sys.exit(f"torchaudio does not import ({error}); fix: {fix}")
    # One thread: inputs this short lose by sharing, a hundredfold on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resampled = torchaudio_resample(torch.from_numpy(samples), rate, SAMPLE_RATE).numpy()
    torch.set_num_threads(threads)
    return resampled


def utter(clips, rng):
    """Recordings at 8 kHz -> one utterance at 16 kHz with gaps, levels, speed and noise of its
    own."""
    pieces = [np.zeros(int(SOURCE_RATE * rng.uniform(0.05, 0.15)), np.float32)]
    for clip in clips:
        gap = np.zeros(int(SOURCE_RATE * rng.uniform(0.04, 0.25)), np.float32)
        pieces += [clip * np.float32(10 ** (rng.uniform(-3, 3) / 20)), gap]
    # Speed (and pitch): claim another sampling rate, 0.85 to 1.2 of 8 kHz. Steps of 200 Hz, 2.5%,
    # keep the resampling filters short.
    speech = resample(np.concatenate(pieces), 200 * int(rng.integers(34, 49)))
    # Noise: its power falls as frequency ** -colour (0 white, 2 brown), flat below 50 Hz; SNR 15 to
    # 40 dB. It is made at a length whose FFT is fast.
    count = -(-len(speech) // 4000) * 4000
    colour = rng.uniform(0, 2)
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 50.0)
    spectrum = np.fft.rfft(rng.standard_normal(count)) * frequency ** (-colour / 2)
    noise = np.fft.irfft(spectrum)[: len(speech)]
    level = np.sqrt(np.mean(speech**2) / np.mean(noise**2))
    noise *= level * 10 ** (-rng.uniform(15, 40) / 20)
    mixed = (speech + noise) * 10 ** (rng.uniform(-6, 6) / 20)
    return (mixed * min(1.0, 0.98 / np.abs(mixed).max())).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# The build

# The file's own lines are longer than these: a backslash goes on with the same one.
README = """# Spoken questions and translations from the Asterisk prompts

Made by `python -m corpora.asterisk --seed {seed}` from the recordings in the Debian packages
asterisk-core-sounds-{{en,fr,es,it,ru}}-wav \
(source: http://downloads.asterisk.org/pub/telephony/asterisk/).
The recordings were changed: cut, joined, resampled, given other levels and speeds, and mixed \
with noise.

Voices: English and Spanish Allison Smith (theivrvoice.com), CC BY-SA 3.0; \
French June Wallack (junewallack.com), text
by Clod Patry, Kristopher Lalletti and June Wallack, CC BY-SA 3.0; \
Italian Carlo Flora (carloflora.com), text by Silvia
Petrin, CC BY 3.0; Russian provided by Maxim Topal (ivrvoice.ru), CC BY 3.0. \
Financial contributions: Digium, Inc., for
French also Unlimitel and BGM Informatique. \
This folder: CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/
"""


def check_packages(sounds, docs):
    """Exit with status 2 and the apt-get line that helps unless every needed file is there."""
    missing = []
    for language, voice in VOICES.items():
        if not all((sounds / voice / f"{name}.wav").is_file() for name in LEXICON[language]):
            missing.append(f"asterisk-core-sounds-{language}-wav")
        if language in TRANSCRIBED and not (docs / TRANSCRIPT.format(language)).is_file():
            missing.append(f"asterisk-core-sounds-{language}")
    if missing:
        # Container images often drop /usr/share/doc of the packages they install.
        option = "-o Dpkg::Options::=--path-include='/usr/share/doc/*'"
        fix = f"apt-get install --reinstall {option} {' '.join(missing)}"
        trouble = f"not all there below {sounds} and {docs}: {', '.join(missing)}"
        print(f"{trouble}\nfix: {fix}", file=sys.stderr)
        sys.exit(2)


def build(corpus, sounds, docs, sizes, seed):
    """Fill the corpus. sizes: {split: rows}."""
    # (split, language) -> [(recording, text)]
    sentences = defaultdict(list)
    for language in TRANSCRIBED:
        usable = {}
        for name, text in read_prompts(docs / TRANSCRIPT.format(language), language):
            path = sounds / VOICES[language] / f"{name}.wav"
            with corpus.row(str(path)):
                # A few sentences were never recorded.
                if path.is_file() and 0.5 <= len(load(path)) / SOURCE_RATE <= 5.0:
                    usable.setdefault(plain(text), []).append((name, text))
        points = np.random.default_rng(seed).permutation(len(usable)) / len(usable)
        for x, same in zip(points, usable.values()):
            sentences[split_at(x), language] += same
    (corpus.folder / "audio").mkdir()
    for number, split in enumerate(SPLITS):
        ends = np.round(np.cumsum(list(MIX.values())) / 100 * sizes[split]).astype(int)
        groups = np.repeat(list(MIX), np.diff(ends, prepend=0)).tolist()
        order = np.random.default_rng([seed, number])
        seen = defaultdict(set)
        decks = defaultdict(list)
        order.shuffle(groups)
        for i, group in enumerate(tqdm(groups, split, unit="row")):
            rng = np.random.default_rng([seed, number, i])
            if group.startswith("prompts-"):
                language = group[-2:]
                # Every sentence once before any comes again.
                if not decks[language]:
                    decks[language] = [*sentences[split, language]]
                    order.shuffle(decks[language])
                name, text = decks[language].pop()
                names = [name]
                row = {
                    "prompt": question("transcribe", language, rng),
                    "reference": text,
                    "target": text,
                    "transcript": plain(text),
                    "group": group,
                }
            else:
                language = group[:2]
                row, names = compose(group, split, seed, rng, seen[group])
            audio = f"audio/{split}-{i + 1:05d}.flac"
            clips = [load(sounds / VOICES[language] / f"{name}.wav") for name in names]
            corpus.write_flac(audio, utter(clips, rng), SAMPLE_RATE)
            corpus.rows[split].append({"audio": audio, **row})
    (corpus.folder / "README.md").write_text(README.format(seed=seed), encoding="utf-8")


def report(out, rows):
    """Print rows per split and group, hours of audio and vocabulary sizes."""
    table = [["group", *SPLITS]]
    for group in MIX:
        counts = [sum(row["group"] == group for row in rows[split]) for split in SPLITS]
        table.append([group, *counts])
    table.append(["all", *(len(rows[split]) for split in SPLITS)])
    hours = []
    for split in SPLITS:
        seconds = sum(soundfile.info(out / row["audio"]).duration for row in rows[split])
        hours.append(f"{seconds / 3600:.2f}")
    table.append(["hours", *hours])
    for name, *values in table:
        print(f"{name:22s}" + "".join(f"{value:>12}" for value in values))
    for name, key in (("composed", "slots"), ("all", "audio")):
        part = [row for split in SPLITS for row in rows[split] if key in row]
        answers = " ".join(f"{row['reference']} {row['target']}" for row in part)
        words = len(set(re.findall(r"[\w']+", answers.lower())))
        characters = len(set("".join(row["transcript"] for row in part)))
        print(f"{name} rows: {words} words in answers, {characters} characters in transcripts")


def main(arguments=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m corpora.asterisk", description=summary)
    add = parser.add_argument
    sounds = Path("/usr/share/asterisk/sounds")
    docs = Path("/usr/share/doc")
    add("--out", type=Path, required=True, help="folder to make")
    add("--sounds", type=Path, default=sounds, help="where the voices are")
    add("--transcripts", type=Path, default=docs, help="where their texts are")
    for split, rows in zip(SPLITS, (4000, 200, 400)):
        add(f"--{split}", type=int, default=rows, help=f"rows (default {rows})")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_packages(args.sounds, args.transcripts)
    sizes = {split: getattr(args, split) for split in SPLITS}
    with new_corpus(args.out) as corpus:
        build(corpus, args.sounds, args.transcripts, sizes, args.seed)
    report(args.out, corpus.rows)


if __name__ == "__main__":
    main()
