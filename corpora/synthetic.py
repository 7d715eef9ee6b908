"""The synthetic spoken task of the default run: a source-filter voice, and questions about it.

    rows("qa", {"train": 2000, "validation": 96, "test": 300}, seed=0)

Somebody does something with some things somewhere on some day; the audio says it, in English for
"qa" and in Japanese for "translation". Nothing is downloaded or written: speech is made when it is
asked for, from its phones and a seed.

The answer's wording has free choices (determiner, verb, preposition, ...). Supervised targets draw
them at random 90% of the time; the reference fixes them by the content. So the base learns to hear
and to speak, but not which wording is rewarded: that is left for RL to find out.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data import AUDIO, SAMPLE_RATE


@dataclass(frozen=True)
class Speech:
    """What a row holds in place of an audio file's path."""

    phones: str
    seed: int  # the speaker, the pace and the noise

    def samples(self) -> torch.Tensor:
        return synthesize(self.phones, self.seed)


# --------------------------------------------------------------------------------------------------
# Synthetic speech: a source-filter voice. Pulses and noise, shaped frame by frame by formants in
# the STFT domain.

# Phone: F1, F2, F3 (Hz; vowels from Peterson & Barney 1952), voicing, noise, noise centre (Hz),
# length (ms)
PHONES = {
    "i": (270, 2290, 3010, 1, 0, 0, 75), "I": (390, 1990, 2550, 1, 0, 0, 60),
    "e": (530, 1840, 2480, 1, 0, 0, 70), "a": (660, 1720, 2410, 1, 0, 0, 75),
    "A": (730, 1090, 2440, 1, 0, 0, 75), "o": (570, 840, 2410, 1, 0, 0, 75),
    "U": (440, 1020, 2240, 1, 0, 0, 60), "u": (300, 870, 2240, 1, 0, 0, 70),
    "V": (640, 1190, 2390, 1, 0, 0, 60), "R": (490, 1350, 1690, 1, 0, 0, 70),
    "m": (250, 1000, 2200, 0.5, 0, 0, 55), "n": (250, 1500, 2500, 0.5, 0, 0, 50),
    "l": (360, 1300, 2700, 0.6, 0, 0, 50), "r": (330, 1060, 1380, 0.6, 0, 0, 50),
    "w": (290, 610, 2150, 0.6, 0, 0, 50), "j": (260, 2070, 3020, 0.6, 0, 0, 45),
    "s": (320, 1390, 2530, 0, 0.35, 5500, 75), "z": (320, 1390, 2530, 0.3, 0.2, 5500, 60),
    "S": (300, 1840, 2750, 0, 0.4, 3000, 75), "f": (340, 1100, 2080, 0, 0.15, 4500, 60),
    "v": (220, 1100, 2080, 0.4, 0.08, 4500, 50), "h": (500, 1500, 2500, 0, 0.2, 1500, 50),
    "T": (320, 1290, 2540, 0, 0.1, 6000, 55), "p": (400, 1100, 2150, 0, 0.25, 900, 55),
    "b": (200, 1100, 2150, 0.2, 0.1, 900, 50), "t": (400, 1600, 2600, 0, 0.35, 4000, 55),
    "d": (200, 1600, 2600, 0.2, 0.15, 4000, 50), "k": (300, 1990, 2850, 0, 0.3, 2000, 60),
    "g": (200, 1990, 2850, 0.2, 0.15, 2000, 50), " ": (500, 1500, 2500, 0, 0, 0, 25),
}  # fmt: skip
STOPS = set("pbtdkg")  # silence first, then the burst


def synthesize(phones: str, seed: int) -> torch.Tensor:
    """Speech for a string of phones: (samples,) float32 at 16 kHz. The seed is the speaker, the
    pace and the noise."""
    rng = np.random.default_rng(seed)
    pitch = rng.uniform(90, 230)  # Hz
    size = rng.uniform(0.9, 1.15)
    pace = rng.uniform(0.85, 1.15)
    snr = rng.uniform(15, 30)  # dB
    hop = 128  # samples: 8 ms
    n_fft = 512  # samples: 32 ms
    frames = []
    for phone in f" {phones} ":
        *values, milliseconds = PHONES[phone]
        count = max(2, round(milliseconds * pace * rng.uniform(0.85, 1.15) / 8))
        block = np.tile(np.array(values, dtype=np.float32), (count, 1))
        if phone in STOPS:
            block[: count // 2, 4] = 0
        frames.append(block)
    track = torch.from_numpy(np.concatenate(frames))  # (frames, 6)
    # Coarticulation: each frame is the mean of itself and its neighbours.
    smooth = torch.nn.functional.avg_pool1d(track.T[None], 3, 1, 1, count_include_pad=False)
    smooth = smooth[0].T
    formants = smooth[:, :3] * size
    voicing = smooth[:, 3]
    noise = smooth[:, 4]
    centre = track[:, 5].clamp(min=1)

    # What sounds, (2, bins, frames): pulses at the pitch, and noise.
    samples = len(track) * hop
    time = np.arange(samples) / SAMPLE_RATE
    wobble = np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * time + rng.uniform(0, 6))
    contour = pitch * (1 + 0.08 * wobble - 0.05 * time)
    pulses = np.diff(np.floor(np.cumsum(contour / SAMPLE_RATE)), prepend=0).astype(np.float32) * 6
    breath = rng.standard_normal(samples).astype(np.float32)
    source = torch.from_numpy(np.stack((pulses, breath)))
    window = torch.hann_window(n_fft)
    source = torch.stft(source, n_fft, hop, window=window, return_complex=True)
    source = source[..., : len(track)]

    # What shapes it.
    f = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)[:, None]  # (bins, 1)
    # The glottal source falls off with frequency.
    vocal_tract = 1 / (1 + (f / 500) ** 2).sqrt()
    for k, bandwidth in enumerate((80.0, 100.0, 140.0)):
        # A second-order resonance at F, (frames,).
        F = formants[:, k]
        vocal_tract = vocal_tract * F**2 / ((F**2 - f**2) ** 2 + (bandwidth * f) ** 2).sqrt()
    friction = torch.exp(-0.5 * ((f - centre * size) / (0.35 * centre)) ** 2)
    spectrum = source[0] * vocal_tract * voicing + source[1] * friction * noise * 3
    audio = torch.istft(spectrum, n_fft, hop, window=window)
    audio = audio / audio.square().mean().sqrt()
    hiss = torch.from_numpy(rng.standard_normal(len(audio)).astype(np.float32))
    return 0.05 * (audio + hiss * 10 ** (-snr / 20))


# --------------------------------------------------------------------------------------------------
# Synthetic tasks

# English word -> (phones, Japanese in Latin letters)
NAMES = {
    "Anna": ("anV", "anna"), "Boris": ("borIs", "borisu"), "Clara": ("klarV", "kurara"),
    "David": ("deivId", "deibitto"), "Emma": ("emV", "ema"), "Felix": ("filIks", "ferikkusu"),
    "Greta": ("gretV", "gureta"), "Hugo": ("hjugo", "hyuugo"),
}  # fmt: skip
VERBS = {
    "bought": ("bot", "katta"), "sold": ("sold", "utta"), "found": ("faund", "mitsuketa"),
    "lost": ("lAst", "nakushita"),
}  # fmt: skip
NUMBERS = {
    "two": ("tu", "futatsu"), "three": ("Tri", "mittsu"), "four": ("for", "yottsu"),
    "five": ("faiv", "itsutsu"), "six": ("sIks", "muttsu"), "seven": ("sevVn", "nanatsu"),
    "eight": ("eit", "yattsu"), "nine": ("nain", "kokonotsu"),
}  # fmt: skip
COLOURS = {
    "red": ("red", "akai"), "blue": ("blu", "aoi"), "green": ("grin", "midori"),
    "yellow": ("jelo", "kiiroi"), "black": ("blak", "kuroi"), "white": ("wait", "shiroi"),
}  # fmt: skip
OBJECTS = {
    "apples": ("apVlz", "ringo"), "books": ("bUks", "hon"), "chairs": ("tSerz", "isu"),
    "lamps": ("lamps", "ranpu"), "boxes": ("bAksIz", "hako"), "shirts": ("SRts", "shatsu"),
    "bottles": ("bAtVlz", "bin"), "hats": ("hats", "boushi"),
}  # fmt: skip
PLACES = {
    "market": ("mArkIt", "ichiba"), "station": ("steiSVn", "eki"), "school": ("skul", "gakkou"),
    "harbour": ("hArbR", "minato"), "garden": ("gArdVn", "niwa"), "bakery": ("beikRi", "panya"),
}  # fmt: skip
DAYS = {
    "Monday": ("mVndei", "getsuyou"), "Tuesday": ("tjuzdei", "kayou"),
    "Wednesday": ("wenzdei", "suiyou"), "Thursday": ("TRzdei", "mokuyou"),
    "Friday": ("fraidei", "kinyou"), "Saturday": ("satRdei", "doyou"),
    "Sunday": ("sVndei", "nichiyou"),
}  # fmt: skip
FIELDS = (NAMES, VERBS, NUMBERS, COLOURS, OBJECTS, PLACES, DAYS)
VERB_WORDS = {
    "bought": ("bought", "purchased", "acquired"),
    "sold": ("sold", "traded", "auctioned"),
    "found": ("found", "discovered", "spotted"),
    "lost": ("lost", "misplaced", "dropped"),
}
DETERMINERS = ("the", "those", "some")
PREPOSITIONS = ("at", "in", "near")
DAY_WORDS = ("on", "last", "this")
WAS = ("was", "waited", "stayed")
QUESTIONS = ("What happened?", "What was it and where?", "Who was where and when?")


def _english_audio(content) -> tuple[str, str]:
    """The words and their phones."""
    name, verb, number, colour, thing, place, day = content
    text = f"{name} {verb} {number} {colour} {thing} at the {place} on {day}".lower()
    phones = [table[word][0] for table, word in zip(FIELDS, content)]
    phones = phones[:5] + ["at", "zV", phones[5], "An", phones[6]]
    return text, " ".join(phones)


def _japanese_audio(content) -> tuple[str, str]:
    """Subject, day, place, colour, thing, number, verb: neither the words nor their order are
    English."""
    words = [table[word][1] for table, word in zip(FIELDS, content)]
    name, verb, number, colour, thing, place, day = words
    text = f"{name} wa {day} ni {place} de {colour} {thing} o {number} {verb}"
    phones = text.replace("sh", "S").replace("ch", "tS").replace("y", "j").replace("a", "A")
    return text, phones


def _fixed(index):
    """A choice for `_answer`: the deciding field's place in its table decides."""
    return lambda options, field: options[index[field] % len(options)]


def _random(rng):
    """A choice for `_answer`: whatever field decides, chance does."""
    return lambda options, field: options[rng.integers(len(options))]


def _answer(question: int, content, choice) -> tuple[str, dict[str, str]]:
    """The answer to QUESTIONS[question] with the wording that choice(options, deciding field)
    picks; and its slots by field."""
    name, verb, number, colour, thing, place, day = content
    things = f"{choice(DETERMINERS, 4)} {number} {colour} {thing}"
    where = f"{choice(PREPOSITIONS, 5)} the {place}"
    verbs = VERB_WORDS[verb]
    heard = {"verb": "|".join(verbs), "number": number, "colour": colour}
    heard |= {"thing": thing, "place": place}
    if question == 0:
        text = f"{name} {choice(verbs, 0)} {things} {where} {choice(DAY_WORDS, 6)} {day}."
        return text, {"name": name, **heard, "day": day}
    if question == 1:
        return f"{things.capitalize()} were {choice(verbs, 3)} {where}.", heard
    text = f"{choice(DAY_WORDS, 6).capitalize()} {day} {name} {choice(WAS, 0)} {where}."
    return text, {"name": name, "place": place, "day": day}


def rows(task: str, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Splits of the spoken "qa" or "translation" task. No content (seven slot values) occurs in two
    rows."""
    rng = np.random.default_rng([seed, ("qa", "translation").index(task)])
    say = _english_audio if task == "qa" else _japanese_audio
    seen = set()
    splits = {}
    for split, size in sizes.items():
        made = splits[split] = []
        while len(made) < size:
            index = [int(rng.integers(len(table))) for table in FIELDS]
            if tuple(index) in seen:
                continue
            seen.add(tuple(index))
            content = [list(table)[i] for table, i in zip(FIELDS, index)]
            question = len(made) % len(QUESTIONS) if task == "qa" else 0
            asked = QUESTIONS[question] if task == "qa" else "Translate into English."
            transcript, phones = say(content)
            reference, slots = _answer(question, content, _fixed(index))
            free = rng.random() < 0.9
            wording, _ = _answer(question, content, _random(rng))
            row = {
                "audio": Speech(phones, int(rng.integers(2**31))),
                "prompt": AUDIO + asked,
                "reference": reference,
                "target": wording if free else reference,
                "transcript": transcript,
                "slots": slots,
            }
            made.append(row)
    return splits
