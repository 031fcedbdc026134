"""Hand-written word lists of English: closed classes, frequent verbs with their forms, endings, and number.

Nothing here is learned from data. `forms_of` analyses a word as a verb by the lists and the regular spelling rules;
`other_number` and `plural_of` turn a word that marks number into its counterpart. All words are lower case.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

VerbForm = Literal["base", "s", "past", "participle", "ing"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- closed classes --------------------------------------------------------------------------------------------------

ARTICLES = _words("a an the")
DEMONSTRATIVES = _words("this that these those")
QUANTIFIERS = _words(
    "all another any both each either enough every few fewer half less many more most much neither no other several some "
    "such what whatever which whichever"
)
DETERMINERS = ARTICLES | DEMONSTRATIVES | QUANTIFIERS
POSSESSIVES = _words("my your his her its our their whose")
SUBJECT_PRONOUNS = _words("i he she we they thou ye")
OBJECT_PRONOUNS = _words("me him us them thee")
OTHER_PRONOUNS = _words(
    "it you mine yours hers ours theirs myself yourself himself herself itself ourselves yourselves themselves oneself "
    "one anyone anything anybody everyone everything everybody noone nobody nothing none someone something somebody "
    "who whom whoever whomever which what that this these those"
)
INDEFINITE_PRONOUNS = _words(
    "anyone anything anybody everyone everything everybody nobody nothing none someone something somebody"
)
PRONOUNS = SUBJECT_PRONOUNS | OBJECT_PRONOUNS | OTHER_PRONOUNS
PREPOSITIONS = _words(
    "aboard about above across after against along alongside amid amidst among amongst around as at atop before behind "
    "below beneath beside besides between beyond by concerning considering despite down during except excluding for from "
    "in including inside into like near of off on onto out outside over past per regarding round since than through "
    "throughout till to toward towards under underneath unlike until unto up upon versus via vs with within without "
    "worth"
)
PARTICLES = _words(
    "about across along apart around aside away back by down forth in off on out over through together up"
)
BE = _words("be am are is was were been being 's 're 'm ai")
HAVE = _words("have has had having 've 'd")
DO = _words("do does did doing done")
MODALS = _words("can could may might must shall should will would 'll ca wo cannot ought")
NEGATIONS = _words("not n't nt never")
COORDINATORS = _words("and or but nor & yet plus")
SUBORDINATORS = _words(
    "after although as because before if lest once provided since so than that though till unless until whereas whether "
    "while whilst"
)
WH_ADVERBS = _words("when where why how whenever wherever however")
RELATIVES = _words("who which that")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion "
    "dozen"
)
ADVERBS = _words(
    "again ago almost already also always altogether anyway anywhere apparently away back barely else elsewhere enough "
    "even eventually ever everywhere exactly far fast forever frequently further furthermore hardly hence here hereby "
    "however indeed instead just largely later least likewise long maybe meanwhile merely moreover mostly much namely "
    "nearly never nevertheless next nonetheless not now nowhere often once only otherwise overall perhaps please pretty "
    "quite rather really seldom simply so somehow sometimes somewhat somewhere soon still then there thereby therefore "
    "though thus together too twice very well yet"
)
DEGREE_ADVERBS = _words(
    "about almost as completely entirely even extremely fairly far how just less more most much nearly only pretty quite "
    "rather really so somewhat too truly very"
)
ADJECTIVES = _words(
    "able afraid alive alone asleep available aware bad beautiful best better big black blue bright brown busy certain "
    "cheap clean clear close cold common cool correct current daily dark dead dear deep different difficult dirty dry due "
    "early east easy eastern empty entire equal excellent exact extra fair false familiar famous far fast fat federal "
    "final fine firm first flat foreign former free fresh friendly full funny future general glad global good grand gray "
    "great green grey guilty half happy hard healthy heavy high honest hot huge human ill illegal important internal key "
    "kind large last late lazy lead least left legal likely little local lonely long loud lovely low lower lucky mad main "
    "major male mean medium mere mid military minor modern narrow national natural necessary new nice normal north "
    "northern odd ok okay old only open orange other outer own pale past perfect plain pleasant polite poor popular "
    "possible present pretty previous private prior proper proud public pure quick quiet rare ready real recent red "
    "regular rich right rough round royal rude sad safe same second senior separate serious severe sharp short sick "
    "silent silly similar simple single slow small smart smooth social soft solid sorry sour south southern special "
    "stable steep strange strict strong stupid sudden super sure sweet tall tender terrible thick thin third tight tiny "
    "tired top tough toxic true ugly unable unlikely upper upset urban useful usual vast warm weak wealthy weird west "
    "western wet whole wide wild wise wonderful wooden worse worst worth worthy wrong yellow young rusty "
    "fourth fifth sixth seventh eighth ninth tenth amazing boring challenging charming confusing disappointing existing "
    "exciting fascinating interesting leading missing outstanding overwhelming refreshing relaxing surprising upcoming "
    "willing committed concerned determined disappointed educated excited experienced impressed inclined interested "
    "involved limited married pleased satisfied scared surprised worried"
)
TIME_NOUNS = _words(
    "today tomorrow tonight yesterday morning afternoon evening night day week weekend month year time summer winter "
    "autumn spring fall monday tuesday wednesday thursday friday saturday sunday january february march april june july "
    "august september october november december minutes hours days weeks months years times"
)
BARE_TIMES = _words("today tomorrow tonight yesterday monday tuesday wednesday thursday friday saturday sunday")
NOUN_ENDINGS = (
    "tion sion ment ness ity ship hood ism ist age ance ence ency ancy dom ology ography eer tude sis ware man men woman "
    "women er or"
).split()
ADJECTIVE_ENDINGS = "ous ful ive able ible ical ial al ic less ish ary ory ant ent esque proof like some".split()
ADVERB_ENDING = "ly"
NOT_ADVERBS_IN_LY = _words(
    "family reply supply friendly only early july apply fly assembly daily weekly monthly likely lovely lonely ugly holy "
    "belly rally ally bully italy monopoly anomaly elderly costly deadly lively rely comply imply multiply butterfly "
    "yearly silly jelly"
)

# --- verbs -----------------------------------------------------------------------------------------------------------

# Frequent regular verbs, by hand; the irregular ones come with their forms below.
REGULAR_VERBS = _words(
    "accept accuse achieve acknowledge act adapt add address adjust admire admit adopt advise affect afford agree aim "
    "allow announce annoy answer apologize appear applaud apply appoint appreciate approach approve argue arrange arrest "
    "arrive ask assess assign assist assume assure attach attack attempt attend attract avoid bake ban bark base beg "
    "behave believe belong benefit blame block boil book borrow bother bounce brush burn bury call calm cancel capture "
    "care carry cause celebrate challenge change charge chase chat cheat check cheer chew claim clean clear climb close "
    "collapse collect comb combine comment commit communicate compare compete complain complete concern conclude conduct "
    "confess confirm confuse connect consider consist constitute construct consult consume contact contain continue "
    "contribute control convert convince cook copy correct cost count cover crash create criticize cross cry cure damage "
    "dance dare deal decide declare decline decorate decrease deduct defeat defend define delay delete deliver demand "
    "demonstrate deny depart depend derive describe deserve design desire destroy detect determine develop die differ "
    "direct disagree disappear disappoint discover discuss dislike display distribute disturb divide double doubt drag "
    "dress drop drown dry earn edit educate elect eliminate embrace emerge emphasize employ enable encourage end enforce "
    "engage enjoy ensure enter entertain escape establish estimate evaluate examine exceed exchange excite exclude excuse "
    "execute exercise exist expand expect experience explain explode explore export expose express extend face fade fail "
    "favor fear feature figure file fill film finish fire fit fix float flow focus fold follow force form found frame "
    "fulfill function fund gain gather generate govern grab grant greet guarantee guard guess guide hand handle hang "
    "happen hate head heal heat help hesitate hire hope hurry identify ignore imagine impact implement imply import "
    "impose impress improve include incorporate increase indicate influence inform inspire install insist insult intend "
    "interest interpret interview introduce invade invent invest investigate invite involve issue join joke judge jump "
    "justify kick kill kiss knock label lack land last laugh launch learn lick lift like limit link list listen live load "
    "lock look love maintain manage manufacture march mark marry match matter mean measure melt mention mind miss mix "
    "monitor motivate move multiply murder name need neglect negotiate nominate note notice notify obey object observe "
    "obtain occupy occur offer open operate oppose order organize outline overcome own pack paint park participate pass "
    "perform permit persuade phone pick place plan plant play please point pollute possess post postpone pour practice "
    "praise pray predict prefer prepare present preserve press pretend prevent print proceed process produce program "
    "promise promote pronounce propose protect protest prove provide publish pull pump punish purchase push question quote "
    "race raise reach react realize receive recall recognize recommend record recover reduce refer reflect refuse regard "
    "regret reject relate relax release rely remain remember remind remove rent repair repeat replace reply report "
    "represent request require rescue research reserve resist resolve respect respond rest restore restrict result retain "
    "retire return reveal review reward risk rob roll rule rush sail satisfy save scare schedule score scream search seem "
    "select separate serve settle shape share shift shop shout show sign signal slip slow smell smile smoke solve sort "
    "sound spare spell spill stare start state stay step stop store stress stretch strengthen struggle study submit "
    "succeed suffer suggest suit supply support suppose surprise surround survive suspect suspend switch talk taste tend "
    "test thank threaten tie touch tour trace track trade train transfer transform translate transport travel treat "
    "tremble trust try tune turn type undergo unite update upgrade urge use vary view visit vote wait walk wander want "
    "warn wash waste watch water welcome whisper wish witness wonder work worry wrap yell zoom"
)
# base past participle; forms that are equal stand twice
_IRREGULAR = """arise arose arisen|awake awoke awoken|bear bore born|beat beat beaten|become became become|begin began
begun|bend bent bent|bet bet bet|bind bound bound|bite bit bitten|bleed bled bled|blow blew blown|break broke broken|breed
bred bred|bring brought brought|build built built|burst burst burst|buy bought bought|catch caught caught|choose chose
chosen|cling clung clung|come came come|cost cost cost|creep crept crept|cut cut cut|deal dealt dealt|dig dug dug|draw drew
drawn|dream dreamt dreamt|drink drank drunk|drive drove driven|eat ate eaten|fall fell fallen|feed fed fed|feel felt felt|
fight fought fought|find found found|flee fled fled|fly flew flown|forbid forbade forbidden|forget forgot forgotten|forgive
forgave forgiven|freeze froze frozen|get got gotten|give gave given|go went gone|grow grew grown|hang hung hung|hear heard
heard|hide hid hidden|hit hit hit|hold held held|hurt hurt hurt|keep kept kept|know knew known|lay laid laid|lead led led|
leave left left|lend lent lent|let let let|lie lay lain|light lit lit|lose lost lost|make made made|mean meant meant|meet
met met|pay paid paid|prove proved proven|put put put|quit quit quit|read read read|ride rode ridden|ring rang rung|rise
rose risen|run ran run|say said said|see saw seen|seek sought sought|sell sold sold|send sent sent|set set set|shake shook
shaken|shed shed shed|shine shone shone|shoot shot shot|show showed shown|shrink shrank shrunk|shut shut shut|sing sang
sung|sink sank sunk|sit sat sat|sleep slept slept|slide slid slid|speak spoke spoken|speed sped sped|spend spent spent|
spin spun spun|split split split|spread spread spread|stand stood stood|steal stole stolen|stick stuck stuck|sting stung
stung|strike struck struck|swear swore sworn|sweep swept swept|swim swam swum|swing swung swung|take took taken|teach
taught taught|tear tore torn|tell told told|think thought thought|throw threw thrown|understand understood understood|wake
woke woken|wear wore worn|win won won|wind wound wound|withdraw withdrew withdrawn|write wrote written|get got got"""
IRREGULAR_VERBS = [tuple(entry.split()) for entry in _IRREGULAR.split("|")]
VERBS = REGULAR_VERBS | {entry[0] for entry in IRREGULAR_VERBS}

DITRANSITIVES = _words(
    "ask bring buy cost deny feed forgive give grant hand lend offer owe pay promise read sell send serve show sing spare "
    "teach tell throw wish write"
)
TAKE_CLAUSE = _words(  # a clause without "that" may follow
    "admit announce argue assume believe bet claim decide discover doubt explain fear feel figure find forget guess hear "
    "hope imagine insist know learn mean mention notice predict promise prove read realize remember report say see suggest "
    "suppose suspect swear tell think understand wish wonder"
)
TAKE_GERUND = _words(
    "admit avoid begin consider continue deny discuss dislike enjoy finish go hate imagine keep like love mind miss "
    "practice prefer quit recall recommend resist risk start stop suggest try"
)
TAKE_ADJECTIVE = _words("appear become feel get go grow keep look make prove remain seem smell sound stay taste turn")
TAKE_INFINITIVE = _words(  # after an object
    "advise allow ask beg cause challenge convince direct enable encourage expect forbid force get help invite like need "
    "order permit persuade prefer remind request require teach tell urge want warn"
)
CAUSATIVES = _words("have help let make")  # a bare infinitive follows the object
TELLING_NOUNS = _words(  # "that" after them tells what they are, and is no relative
    "belief chance claim evidence fact feeling hope idea news report sense statement suggestion thought way"
)
NOUN_PREPOSITIONS = _words("between of with")  # these belong to the noun before them
TIME_DETERMINERS = _words("all each every last next some that this the past")
_VOWELS = "aeiou"


def _regular_forms(base: str) -> dict[str, VerbForm]:
    """The -s, -ed and -ing forms by the spelling rules; a final consonant also doubled, for either may be right."""
    last, before = base[-1], base[-2:-1]
    ies = last == "y" and before not in _VOWELS
    third = base[:-1] + "ies" if ies else base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    forms: dict[str, VerbForm] = {third: "s", base: "base"}
    stems = [base[:-1] if last == "e" else base]
    if last not in _VOWELS + "wxy" and before in _VOWELS and len(base) <= 7:
        stems.append(base + last)
    for stem in stems:
        forms[stem + "ing"] = "ing"
        forms[(stem[:-1] + "i" if ies else stem) + "ed"] = "past"
    if base.endswith("ie"):
        forms[base[:-2] + "ying"] = "ing"
    if base.endswith("ee"):
        forms[base + "ing"] = "ing"
    return forms


@cache
def _verb_table() -> dict[str, frozenset[tuple[VerbForm, str]]]:
    table: dict[str, set[tuple[VerbForm, str]]] = {}
    for base in REGULAR_VERBS:
        for word, form in _regular_forms(base).items():
            table.setdefault(word, set()).add((form, base))
            if form == "past":
                table[word].add(("participle", base))
    for base, past, participle in IRREGULAR_VERBS:
        forms = [(word, form) for word, form in _regular_forms(base).items() if form != "past"]
        irregular: list[tuple[str, VerbForm]] = [(past, "past"), (participle, "participle")]
        for word, form in forms + irregular:
            table.setdefault(word, set()).add((form, base))
    return {word: frozenset(forms) for word, forms in table.items()}


@cache
def forms_of(word: str) -> frozenset[VerbForm]:
    """The forms that a lower-case word may be of a verb; empty for a word that no list and no ending makes a verb."""
    known = _verb_table().get(word)
    if known is not None:
        return frozenset(form for form, _ in known)
    if len(word) > 4 and word.endswith("ed") and not word.endswith("eed"):
        return frozenset(("past", "participle"))
    if (
        len(word) > 5
        and word.endswith("ing")
        and word not in _words("nothing something anything everything morning evening")
    ):
        return frozenset(("ing",))
    if len(word) > 5 and word.endswith(("ize", "ise", "ify")):
        return frozenset(("base",))
    if len(word) > 6 and word.endswith(("izes", "ises", "ifies")):
        return frozenset(("s",))
    return frozenset()


@cache
def bases_of(word: str) -> frozenset[str]:
    """The listed verbs that a lower-case word may be a form of."""
    return frozenset(base for _, base in _verb_table().get(word, ()))


# --- number ----------------------------------------------------------------------------------------------------------

_PAIRS = "is are|was were|has have|does do|this these|that those"
_OTHER = {a: b for pair in _PAIRS.split("|") for a, b in (pair.split(), pair.split()[::-1])}
IRREGULAR_PLURALS = dict(
    pair.split()
    for pair in "man men|woman women|child children|person people|foot feet|tooth teeth|goose geese|mouse mice|life lives|"
    "wife wives|knife knives|leaf leaves|half halves|shelf shelves|wolf wolves|loaf loaves|thief thieves".split("|")
)


def other_number(word: str) -> str | None:
    """The counterpart in the other number of a verb form or demonstrative that marks it, lower case; else None."""
    return _OTHER.get(word)


def plural_of(noun: str) -> str:
    """The plural of a lower-case noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2:-1] not in _VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def verb_with_s(base: str) -> str:
    """The third person singular of a lower-case verb."""
    return next(word for word, form in _regular_forms(base).items() if form == "s")
