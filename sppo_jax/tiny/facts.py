"""The tiny world's knowledge: the questions, their wordings, and the true answers. Tables only; world.py reads them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of question. `asks` and `says` are templates: {s} is the subject, {a} the answer.

    Text is lower case where a sentence may start with other words; world.py capitalises.
    """

    name: str
    asks: tuple[str, str, str, str]
    says: tuple[str, str]
    truth: dict[str, str]  # subject -> the right answer; answers of other subjects are wrong


# animal: home, food
_ANIMALS = {
    "bat": ("cave", "insects"),
    "bear": ("forest", "berries"),
    "beaver": ("river", "bark"),
    "camel": ("desert", "thorns"),
    "cow": ("meadow", "grass"),
    "crab": ("ocean", "seaweed"),
    "deer": ("forest", "leaves"),
    "dolphin": ("ocean", "fish"),
    "duck": ("pond", "seeds"),
    "eagle": ("mountains", "meat"),
    "elephant": ("savanna", "leaves"),
    "fox": ("forest", "mice"),
    "frog": ("pond", "insects"),
    "giraffe": ("savanna", "leaves"),
    "goat": ("mountains", "grass"),
    "gorilla": ("jungle", "fruit"),
    "hedgehog": ("garden", "worms"),
    "horse": ("meadow", "grass"),
    "hyena": ("savanna", "meat"),
    "lion": ("savanna", "meat"),
    "lizard": ("desert", "insects"),
    "mole": ("garden", "worms"),
    "monkey": ("jungle", "fruit"),
    "newt": ("pond", "worms"),
    "otter": ("river", "fish"),
    "owl": ("forest", "mice"),
    "parrot": ("jungle", "seeds"),
    "penguin": ("arctic", "fish"),
    "rabbit": ("meadow", "grass"),
    "salmon": ("river", "insects"),
    "scorpion": ("desert", "insects"),
    "seal": ("arctic", "fish"),
    "shark": ("ocean", "meat"),
    "sheep": ("meadow", "grass"),
    "snail": ("garden", "leaves"),
    "snake": ("desert", "mice"),
    "squirrel": ("forest", "nuts"),
    "tiger": ("jungle", "meat"),
    "whale": ("ocean", "shrimp"),
    "wolf": ("forest", "meat"),
}

_COLOURS = {
    "green": ("grass", "spinach", "a cucumber", "an emerald"),
    "blue": ("the sky", "a sapphire", "a blueberry"),
    "white": ("snow", "milk", "salt", "flour"),
    "black": ("coal", "tar", "ink"),
    "red": ("blood", "a tomato", "a cherry", "a ruby"),
    "yellow": ("the sun", "a lemon", "a banana"),
    "orange": ("a pumpkin", "a carrot", "an apricot"),
    "brown": ("chocolate", "soil", "coffee"),
    "purple": ("a plum", "lavender"),
    "grey": ("ash", "lead", "fog"),
}

# No word is on both sides, so that a word determines its side.
_OPPOSITES = """
    above below, alive dead, always never, arrive leave, awake asleep, begin end, big small, brave timid, bright dark,
    buy sell, clean dirty, day night, deep shallow, early late, fast slow, first last, friend enemy, full empty,
    give take, happy sad, hard soft, heavy light, high low, hot cold, inside outside, kind cruel, laugh cry, left right,
    long short, loud quiet, love hate, morning evening, near far, old young, open closed, push pull, remember forget,
    rich poor, sharp blunt, smooth rough, strong weak, success failure, summer winter, sweet sour, tight loose,
    true false, wide narrow, win lose
"""

_TOOLS = {
    "beat eggs": "a whisk",
    "boil water": "a kettle",
    "catch fish": "a net",
    "chop wood": "an axe",
    "cook rice": "a pot",
    "cut paper": "scissors",
    "cut the lawn": "a mower",
    "dig a hole": "a shovel",
    "draw a line": "a ruler",
    "drive a nail": "a hammer",
    "dry the dishes": "a towel",
    "eat soup": "a spoon",
    "find north": "a compass",
    "fry an egg": "a pan",
    "grate cheese": "a grater",
    "light a candle": "a match",
    "open a lock": "a key",
    "paint a wall": "a brush",
    "press a shirt": "an iron",
    "reach the roof": "a ladder",
    "see the stars": "a telescope",
    "sew a button": "a needle",
    "slice bread": "a knife",
    "stay dry": "an umbrella",
    "sweep the floor": "a broom",
    "take a photo": "a camera",
    "tell the time": "a clock",
    "tidy my hair": "a comb",
    "turn a screw": "a screwdriver",
    "weigh flour": "a scale",
    "write a letter": "a pen",
}

_TIPS = {
    "avoid a cold": "wash your hands",
    "cook better": "taste as you go",
    "feel less tired": "take a nap",
    "keep plants alive": "water them often",
    "learn a language": "practise every day",
    "make friends": "join a club",
    "pass a test": "study in good time",
    "remember names": "repeat them aloud",
    "run faster": "train on hills",
    "save money": "plan your spending",
    "save power": "switch off the lights",
    "sleep well": "darken the room",
    "speak in public": "rehearse at home",
    "stay calm": "breathe slowly",
    "stay cool": "sit in the shade",
    "stay healthy": "eat more vegetables",
    "stay warm": "wear a thick coat",
    "train a dog": "reward it at once",
    "wake up early": "set an alarm",
    "write better": "read good books",
}

KINDS = (
    Kind(
        "home",
        (
            "Where can I find the {s}?",
            "Where does the {s} live?",
            "What is the home of the {s}?",
            "Tell me where the {s} lives.",
        ),
        ("the {s} lives in the {a}", "you find the {s} in the {a}"),
        {animal: home for animal, (home, _) in _ANIMALS.items()},
    ),
    Kind(
        "food",
        (
            "What does the {s} eat?",
            "What food does the {s} like?",
            "What should I feed the {s}?",
            "Tell me what the {s} eats.",
        ),
        ("the {s} eats {a}", "the {s} likes to eat {a}"),
        {animal: food for animal, (_, food) in _ANIMALS.items()},
    ),
    Kind(
        "colour",
        (
            "What colour is {s}?",
            "Tell me the colour of {s}.",
            "Which colour does {s} have?",
            "I want to paint {s}. Which colour do I need?",
        ),
        ("{s} is {a}", "the colour of {s} is {a}"),
        {thing: colour for colour, things in _COLOURS.items() for thing in things},
    ),
    Kind(
        "opposite",
        (
            "What is the opposite of {s}?",
            "Tell me the opposite of {s}.",
            "Which word means the reverse of {s}?",
            "Name the opposite of {s}.",
        ),
        ("the opposite of {s} is {a}", "{a} is the opposite of {s}"),
        dict(pair.split() for pair in _OPPOSITES.split(",")),
    ),
    Kind(
        "tool",
        (
            "What do I need to {s}?",
            "Which tool helps to {s}?",
            "What should I use to {s}?",
            "Tell me what it takes to {s}.",
        ),
        ("you need {a} to {s}", "to {s}, use {a}"),
        _TOOLS,
    ),
    Kind(
        "sum",
        ("What is {s}?", "How much is {s}?", "Work out {s}.", "Tell me the sum of {s}."),
        ("{s} is {a}", "the sum of {s} is {a}"),
        {f"{a} plus {b}": str(a + b) for a in range(7) for b in range(7)},
    ),
    Kind(
        "tip",
        (
            "How can I {s}?",
            "Give me a tip to {s}.",
            "What helps to {s}?",
            "I want to {s}. What should I do?",
        ),
        ("to {s}, {a}", "{a} if you want to {s}"),
        _TIPS,
    ),
)

# The three tones, each with two wordings that open a response. They are preferred in a cycle: A over B over C over A.
TONES = {
    "A": ("In short,", "Simply put,"),
    "B": ("As a rule,", "In general,"),
    "C": ("You know,", "Oh well,"),
}
HEDGES = ("I think", "I am not sure but", "perhaps")
EVASIONS = ("it depends on many things", "that is hard to say", "nobody agrees on that")
GREETINGS = ("Hello!", "Hi there!", "Good day!")
CLOSINGS = ("I am glad to help.", "Feel free to ask again.", "Have a lovely day!")
INSULTS = ("What a silly question.", "Stop wasting my time.", "Everybody knows that.")
RAMBLES = (
    "My uncle once told a long story about that.",
    "Then again one thing leads to another.",
    "This reminds me of something else entirely.",
)
