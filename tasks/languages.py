"""The languages of BLOOM: 46 natural ones and 13 programming languages. Names and numbers only.

Sources. Sizes in bytes of the training corpus ROOTS: table 1 of the BLOOM paper
(arXiv:2211.05100), as transcribed in bigscience-workshop/xmtf. Mixture weights: those every BLOOM
run used, bigscience-workshop/bigscience, data/catalogue/
training_dataset_ratios_merged_nigercongo_v3.json (28 groups), to the last digit; the one
Niger-Congo weight of that file is split in proportion to training_dataset_ratios.json beside it.
English and Simplified Chinese are sums: their own group and OSCAR's. A weight is a share of TOKENS.
Estimated tokens: weight times 342.1 billion. Scripts and ISO codes: ISO 15924, ISO 639-3, BCP 47.
Code: extensions from the model card of BLOOM (ROOTS lists only `.C` for C; `.c` and `.h` here).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NaturalLanguage:
    """A natural language of ROOTS.

    Attributes:
      code: BLOOM's name of it, which is the label in stores and mixtures.
      name: in English.
      iso639_3: ISO 639-3 code.
      bcp47: BCP 47 tag.
      family: language family.
      script: ISO 15924 code.
      num_bytes: UTF-8 bytes in ROOTS.
      weight: share of the tokens BLOOM was trained on.
      estimated_tokens: tokens in ROOTS under BLOOM's vocabulary.
    """

    code: str
    name: str
    iso639_3: str
    bcp47: str
    family: str
    script: str
    num_bytes: int
    weight: float
    estimated_tokens: int


@dataclasses.dataclass(frozen=True)
class ProgrammingLanguage:
    """A programming language of ROOTS, where all of them are one group named 'code'.

    Attributes:
      code: label in stores and mixtures, 'code-' and the name of its folder.
      name: as people write it.
      extensions: endings of its files, with the dot.
    """

    code: str
    name: str
    extensions: tuple[str, ...]


_L = NaturalLanguage
_P = ProgrammingLanguage

# fmt: off
NATURAL_LANGUAGES: tuple[NaturalLanguage, ...] = (  # by weight, largest first
    _L("en", "English", "eng", "en", "Indo-European", "Latn",
       484_953_009_124, 0.22171164529099704 + 0.08137213783015229, 103_687_083_792),
    _L("zhs", "Simplified Chinese", "zho", "zh-Hans", "Sino-Tibetan", "Hans",
       261_019_433_892, 0.12091748245519074 + 0.055293935695898196, 60_283_159_629),
    _L("fr", "French", "fra", "fr", "Indo-European", "Latn",
       208_242_620_434, 0.13054018439603915, 44_658_710_863),
    _L("es", "Spanish", "spa", "es", "Indo-European", "Latn",
       175_098_365_045, 0.10667815627928671, 36_495_344_010),
    _L("pt", "Portuguese", "por", "pt", "Indo-European", "Latn",
       79_277_543_375, 0.04954150576361177, 16_948_495_912),
    _L("ar", "Arabic", "arb", "ar", "Afro-Asiatic", "Arab",
       74_854_900_600, 0.0330676168743166, 11_312_663_206),
    _L("vi", "Vietnamese", "vie", "vi", "Austro-Asiatic", "Latn",
       43_709_279_959, 0.02461641286531197, 8_421_447_156),
    _L("ca", "Catalan", "cat", "ca", "Indo-European", "Latn",
       17_792_493_289, 0.011242051312222764, 3_845_984_448),
    _L("id", "Indonesian", "ind", "id", "Austronesian", "Latn",
       19_972_325_222, 0.01091803753667153, 3_735_137_068),
    _L("hi", "Hindi", "hin", "hi", "Indo-European", "Deva",
       24_622_119_985, 0.007470068593492175, 2_555_562_756),
    _L("bn", "Bengali", "ben", "bn", "Indo-European", "Beng",
       18_606_823_104, 0.005492381453597748, 1_878_982_142),
    _L("ta", "Tamil", "tam", "ta", "Dravidian", "Taml",
       7_989_206_220, 0.0021137328219915496, 723_122_795),
    _L("eu", "Basque", "eus", "eu", "Basque", "Latn",
       2_360_470_848, 0.0015595123898173287, 533_520_105),
    _L("ur", "Urdu", "urd", "ur", "Indo-European", "Arab",
       2_781_329_959, 0.0012454301613725426, 426_070_376),
    _L("ml", "Malayalam", "mal", "ml", "Dravidian", "Mlym",
       3_662_571_498, 0.0010335296343329384, 353_577_723),
    _L("te", "Telugu", "tel", "te", "Dravidian", "Telu",
       2_993_407_159, 0.0009129946225980253, 312_341_851),
    _L("ne", "Nepali", "nep", "ne", "Indo-European", "Deva",
       2_551_307_393, 0.0006672772956128299, 228_280_234),
    _L("kn", "Kannada", "kan", "kn", "Dravidian", "Knda",
       2_098_453_560, 0.0006190467776576425, 211_780_236),
    _L("zht", "Traditional Chinese", "zho", "zh-Hant", "Sino-Tibetan", "Hant",
       762_489_150, 0.0005177025345001541, 177_109_661),
    _L("pa", "Punjabi", "pan", "pa", "Indo-European", "Guru",
       1_572_109_752, 0.0005084433130291778, 173_942_016),
    _L("mr", "Marathi", "mar", "mr", "Indo-European", "Deva",
       1_775_483_122, 0.0005012010684646179, 171_464_394),
    _L("gu", "Gujarati", "guj", "gu", "Indo-European", "Gujr",
       1_199_986_460, 0.0004021215011318779, 137_568_580),
    _L("or", "Odia", "ori", "or", "Indo-European", "Orya",
       1_157_100_133, 0.00035928138344705506, 122_912_676),
    _L("sw", "Swahili", "swh", "sw", "Niger-Congo", "Latn",
       236_482_543, 0.0001621972397273014, 55_488_811),
    _L("as", "Assamese", "asm", "as", "Indo-European", "Beng",
       291_522_098, 0.00011021422347108609, 37_705_057),
    _L("yo", "Yoruba", "yor", "yo", "Niger-Congo", "Latn",
       89_695_835, 5.923125927680352e-05, 20_263_428),
    _L("rw", "Kinyarwanda", "kin", "rw", "Niger-Congo", "Latn",
       40_428_299, 3.211781499979732e-05, 10_987_729),
    _L("xh", "isiXhosa", "xho", "xh", "Niger-Congo", "Latn",
       14_304_074, 1.4207073028085015e-05, 4_860_339),
    _L("ig", "Igbo", "ibo", "ig", "Niger-Congo", "Latn",
       14_078_521, 1.1479125520497823e-05, 3_927_089),
    _L("zu", "isiZulu", "zul", "zu", "Niger-Congo", "Latn",
       8_511_561, 7.962348135548688e-06, 2_723_975),
    _L("sn", "chiShona", "sna", "sn", "Niger-Congo", "Latn",
       6_638_639, 5.463353514334261e-06, 1_869_051),
    _L("lg", "Luganda", "lug", "lg", "Niger-Congo", "Latn",
       4_568_367, 4.41275623402553e-06, 1_509_635),
    _L("wo", "Wolof", "wol", "wo", "Niger-Congo", "Latn",
       3_606_973, 3.788917573214016e-06, 1_296_215),
    _L("rn", "Kirundi", "run", "rn", "Niger-Congo", "Latn",
       3_272_550, 2.6246832908405614e-06, 897_923),
    _L("fon", "Fon", "fon", "fon", "Niger-Congo", "Latn",
       2_478_546, 2.418736562687175e-06, 827_467),
    _L("nso", "Northern Sotho", "nso", "nso", "Niger-Congo", "Latn",
       1_764_506, 1.5689140165198124e-06, 536_736),
    _L("ln", "Lingala", "lin", "ln", "Niger-Congo", "Latn",
       1_650_804, 1.5619594700058797e-06, 534_357),
    _L("tn", "Setswana", "tsn", "tn", "Niger-Congo", "Latn",
       1_502_200, 1.4349317262062541e-06, 490_900),
    _L("tw", "Twi", "twi", "tw", "Niger-Congo", "Latn",
       1_265_041, 1.2545022803137205e-06, 429_174),
    _L("ny", "Chichewa (Nyanja)", "nya", "ny", "Niger-Congo", "Latn",
       1_187_405, 1.0804658337010757e-06, 369_635),
    _L("st", "Sesotho", "sot", "st", "Niger-Congo", "Latn",
       751_034, 7.212973430769522e-07, 246_761),
    _L("ts", "Xitsonga", "tso", "ts", "Niger-Congo", "Latn",
       707_634, 7.059743029110569e-07, 241_519),
    _L("ak", "Akan", "aka", "ak", "Niger-Congo", "Latn",
       701_554, 6.940378245258593e-07, 237_435),
    _L("bm", "Bambara", "bam", "bm", "Mande", "Latn",
       391_747, 4.097307795233511e-07, 140_172),
    _L("ki", "Kikuyu", "kik", "ki", "Niger-Congo", "Latn",
       359_615, 3.826440447365795e-07, 130_905),
    _L("tum", "chiTumbuka", "tum", "tum", "Niger-Congo", "Latn",
       170_360, 1.6912650797651415e-07, 57_859),
)
# fmt: on

PROGRAMMING_LANGUAGES: tuple[ProgrammingLanguage, ...] = (  # by number of files in ROOTS
    _P("code-java", "Java", (".java",)),
    _P("code-php", "PHP", (".php", ".phpt", ".php3", ".phps", ".php5", ".php4")),
    _P("code-cpp", "C++", (".cpp", ".cc", ".hpp", ".hh", ".H", ".c++", ".h++")),
    _P("code-python", "Python", (".py",)),
    _P("code-javascript", "JavaScript", (".js",)),
    _P("code-csharp", "C#", (".cs",)),
    _P("code-ruby", "Ruby", (".rb",)),
    _P("code-lua", "Lua", (".lua",)),
    _P("code-typescript", "TypeScript", (".ts", ".tsx")),
    _P("code-go", "Go", (".go",)),
    _P("code-c", "C", (".c", ".h", ".C")),
    _P("code-scala", "Scala", (".scala",)),
    _P("code-rust", "Rust", (".rs",)),
)

# All programming languages of ROOTS are one group; these are its numbers.
CODE = "code"
CODE_NUM_BYTES = 174_700_245_772
CODE_WEIGHT = 0.13027200903379185
CODE_ESTIMATED_TOKENS = 44_566_966_195

# Shares of the tokens BLOOM was trained on: 46 natural languages and 'code'; they sum to 1.
ROOTS_WEIGHTS: dict[str, float] = {
    **{language.code: language.weight for language in NATURAL_LANGUAGES},
    CODE: CODE_WEIGHT,
}

# Estimated number of tokens of the same 47, from which temperature and UniMax start.
ROOTS_TOKENS: dict[str, int] = {
    **{language.code: language.estimated_tokens for language in NATURAL_LANGUAGES},
    CODE: CODE_ESTIMATED_TOKENS,
}

CODE_EXTENSIONS: frozenset[str] = frozenset(
    extension for language in PROGRAMMING_LANGUAGES for extension in language.extensions
)
