"""Config files and overrides: what was written is what is set, and everything else is an error that says where."""

import random
import re
from pathlib import Path

import pytest

from dyhead.config import ConfigError, get, load_config
from dyhead.torchvision import get_cfg

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cfg():
    return get_cfg()


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# The first keys of SOLVER.
SOME = "(LR_SCHEDULER_NAME, MAX_ITER, BASE_LR, ...)"


def in_file(key, text):
    """A config file that sets a key: sections on lines of their own."""
    parts = key.split(".")
    return "\n".join("  " * depth + f"{part}:" for depth, part in enumerate(parts)) + f" {text}\n"


NUMBER_LIKE = ["2026_11_25", "1e3", "0x10", "1:30", "yes", "no", "on", "2026-11-25", "1_000", "010", "0b1", "7", "True",
               "1.50", ".inf", "0o7", "1e-4", "+5", "2026-11-25T10:00:00Z", "12e03", "(1, 2)", "=", "<<"]  # fmt: skip


@pytest.mark.parametrize("text", NUMBER_LIKE)
def test_text_is_taken_as_it_was_written(cfg, write, text):
    load_config(cfg, write(in_file("OUTPUT_DIR", text)), ["MODEL.WEIGHTS", text])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == (text, text)


def test_texts_in_lists_are_taken_as_they_were_written(cfg, write):
    file = write(
        "DATASETS:\n  TRAIN: [2024, 1e3, yes, 2026-11-25, 'a b']\n  TEST: (0x10, '1_0')\n"
        "  REGISTER: [[2024, 1_0.json, on], [1e3, b.json, 010]]\nMODEL: {FPN: {IN_FEATURES: [2, 3]}}\n"
    )
    load_config(cfg, file)
    assert cfg.DATASETS.TRAIN == ("2024", "1e3", "yes", "2026-11-25", "a b")
    assert cfg.DATASETS.TEST == ("0x10", "1_0")
    assert cfg.DATASETS.REGISTER == [["2024", "1_0.json", "on"], ["1e3", "b.json", "010"]]
    assert cfg.MODEL.FPN.IN_FEATURES == ["2", "3"]
    load_config(
        cfg, write("{}"), ["DATASETS.TRAIN", "(2024, 0x10, 1_0.50, 'x')", "DATASETS.REGISTER", "[[1e3, 'a', 7]]"]
    )
    assert cfg.DATASETS.TRAIN == ("2024", "0x10", "1_0.50", "x")
    assert cfg.DATASETS.REGISTER == [["1e3", "a", "7"]]


@pytest.mark.parametrize(
    ("text", "in_yaml", "as_override"),
    [
        ('""', "", ""),
        ("''", "", ""),
        ('"null"', "null", "null"),
        ('"None"', "None", "None"),
        ("it's", "it's", "it's"),
        ("""'say "so"'""", 'say "so"', 'say "so"'),
    ],
)
def test_quotes_say_that_it_is_text(cfg, write, text, in_yaml, as_override):
    load_config(cfg, write(in_file("OUTPUT_DIR", text)))
    assert cfg.OUTPUT_DIR == in_yaml
    load_config(cfg, write("{}"), ["OUTPUT_DIR", text])
    assert cfg.OUTPUT_DIR == as_override


@pytest.mark.parametrize("text", ["", "~", "null", "a: b", "# a", " a"])
def test_on_the_command_line_yaml_has_no_say(cfg, write, text):
    load_config(cfg, write("{}"), ["MODEL.META_ARCHITECTURE", text])
    assert cfg.MODEL.META_ARCHITECTURE == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1e-4", 1e-4),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "100000000000000000000", 1e20),
        ("SOLVER.MAX_ITER", "90_000", 90000),
        ("SOLVER.MAX_ITER", "0x10", 16),
        ("SOLVER.STEPS", "[1_0, 20]", (10, 20)),
        ("SOLVER.STEPS", "(10, 20)", (10, 20)),
        ("SOLVER.STEPS", "()", ()),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", ".inf", float("inf")),
        ("SOLVER.AMP.ENABLED", "yes", True),
        ("SOLVER.AMP.ENABLED", "true", True),
        ("SOLVER.AMP.ENABLED", "True", True),
        ("SOLVER.WEIGHT_DECAY_BIAS", "1e-5", 1e-5),
        ("SOLVER.WEIGHT_DECAY_BIAS", "null", None),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
        ("MODEL.DYHEAD.WINDOW", "null", None),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[1e1], [20.5]]", [[10.0], [20.5]]),
    ],
)
def test_numbers_and_flags_are_the_same_in_files_and_overrides(cfg, write, key, text, value):
    other = get_cfg()
    load_config(cfg, write(in_file(key, text)))
    load_config(other, write("{}"), [key, text])
    for configured in (cfg, other):
        assert get(configured, key) == value
        assert type(get(configured, key)) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "got"),
    [
        ("SOLVER.MAX_ITER", "1:30", "str '1:30'"),  # 90 to YAML 1.1
        ("SOLVER.MAX_ITER", "010", "str '010'"),  # 8 to YAML 1.1
        ("SOLVER.MAX_ITER", "1e3", "float 1000.0"),
        ("SOLVER.MAX_ITER", "2026-11-25", "str '2026-11-25'"),
        ("SOLVER.MAX_ITER", "yes", "bool True"),
        ("SOLVER.BASE_LR", "1" + 400 * "0", "str '1000"),
        ("SOLVER.MAX_ITER", "99999999999999999999", "float 1e+20"),
        ("SOLVER.BASE_LR", "0x" + 5000 * "f", "str '0xfff"),
        ("SOLVER.BASE_LR", 400 * "(" + "1" + 400 * ")", "str '(((("),
        ("SOLVER.STEPS", "5", "int 5"),
        ("SOLVER.AMP.ENABLED", "maybe", "str 'maybe'"),
        ("OUTPUT_DIR", "None", "null"),
    ],
)
def test_what_is_no_value_of_the_key_is_refused_with_what_came(cfg, write, key, text, got):
    file = write(in_file(key, text))
    with pytest.raises(ConfigError) as error:
        load_config(cfg, file)
    assert re.match(rf"config file {re.escape(str(file))}, line \d: {key}: expected \w+ .*, got ", str(error.value))
    assert f", got {got}" in str(error.value)
    assert len(str(error.value)) < 500
    with pytest.raises(ConfigError, match=f"^overrides: {key}: expected ") as error:
        load_config(cfg, write("{}"), [key, text])
    assert f", got {got}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OUTPUT_DIR: a\nSEED: 1\nOUTPUT_DIR: b\n", "OUTPUT_DIR stands twice, in line 1 and in line 3"),
        ("SOLVER:\n  MAX_ITER: 1\nSEED: 1\nSOLVER:\n  GAMMA: 0.1\n", "SOLVER stands twice, in line 1 and in line 4"),
        ("SOLVER:\n  GAMMA: 0.1\n  GAMMA: 0.1\n", "SOLVER.GAMMA stands twice, in line 2 and in line 3"),
        ("SOLVER: {GAMMA: 0.1, 'GAMMA': 0.2}\n", "SOLVER.GAMMA stands twice, in line 1 and in line 1"),
        ("SOLVER: {GAMMA: 0.1}\nSOLVER.GAMMA: 0.2\n", "SOLVER.GAMMA stands twice, in line 1 and in line 2"),
        ("_BASE_: a.yaml\n_BASE_: b.yaml\n", "_BASE_ stands twice, in line 1 and in line 2"),
    ],
)
def test_what_stands_twice_is_refused_with_both_lines(cfg, write, text, message):
    file = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(cfg, file)
    assert str(error.value) == f"config file {file}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SEED: 1\nSOLVER:\n", f", line 2: SOLVER: expected a section of keys {SOME}, got nothing"),
        ("SOLVER: null", ", line 1: SOLVER: expected a section of keys"),
        ("SOLVER:\n  AMP: True\n", ", line 2: SOLVER.AMP: expected a section of keys (ENABLED, DTYPE, ...)"),
        ("SOLVER: [1, 2]", ", line 1: SOLVER: expected a section of keys"),
        ("SOLVER: {GAMMA: {A: 1}}", ", line 1: SOLVER.GAMMA: expected a value, got a section"),
        ("SOLVER: {GAMMA: {}}", ", line 1: SOLVER.GAMMA: expected a value, got a section"),
        ("SOLVER: {STEPS: [{A: 1}]}", ", line 1: expected values in a list, got keys"),
        ("SEED:\n", ", line 1: SEED: expected int (its default is -1), got null"),
        ("SOLVERS:\n  GAMMA: 1\n", ", line 1: unknown key SOLVERS; did you mean SOLVER?"),
        ("1: 2", ", line 1: unknown key 1"),
        ("true: 2", ", line 1: unknown key true"),
        ("~: 2", ", line 1: unknown key ~"),
        ('"": 2', ", line 1: expected the name of a key"),
        ("[a]: 2", ", line 1: expected the name of a key"),
        ("? {a: 1}\n: 2", ", line 1: expected the name of a key"),
        ("SOLVER: {_BASE_: a.yaml}", ", line 1: unknown key SOLVER._BASE_"),
        ("\n# nothing\n", ": expected a mapping of keys to values, got nothing"),
        ("--- a\n--- b\n", ": not YAML that can be read safely: expected a single document"),
        ("SOLVER:\n\tGAMMA: 1\n", ": not YAML that can be read safely: "),
        ('OUTPUT_DIR: "\\UFFFFFFFF"', ": not YAML that can be read safely: "),
        ("SEED: !!int 3", ", line 1: not YAML that can be read safely: it has the tag !!int"),
        ("!!python/name:os.system a: 3", ", line 1: not YAML that can be read safely: it has the tag"),
        (20000 * "[", ": nested too deeply"),
        ("SOLVER: &a {AMP: *a}", ": nested too deeply"),
        ("&a SEED: *b", ": not YAML that can be read safely: "),
        (b"OUTPUT_DIR: \xff", ": cannot be read: expected UTF-8, got "),
        ("SEED: 1".encode("utf-16"), ": cannot be read: expected UTF-8, got "),
        (b"OUTPUT_DIR: a\x00b", ": not YAML that can be read safely: "),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused_with_the_place(cfg, write, text, message):
    file = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(cfg, file)
    assert str(error.value).startswith(f"config file {file}{message}")


EVAL = "MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval [%s]}}"


def test_arithmetic_with_lists_is_read_as_detectron2s_own_files_have_it(cfg, write):
    for text in (
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
        "[[8 - 1, -3 + 4.5, 7 / 2, 2 ** -1]]",
        "[[x + y for y in (1, 2)] for x in [10, 20]]",
        "[[2 ** x, 2 ** -x] for x in [0, 53]]",
    ):
        load_config(cfg, write(EVAL % f'"{text}"'))
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [list(row) for row in eval(text)], text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {folder}/run')", "open('{folder}/run', 'w')", "[open('{folder}/run', 'w')]",
        "[x for x in open('{folder}/run', 'w')]", "[().__class__]", "[x]", "[int(3.5)]", "[1 for x in range(3)]",
        "['a' * 3]", "['a']", "[None]", "[True]", "32", "[[1] * 3]", "[[1] + [2]]", "[x for x in [1] if x]",
        "[1 if 1 else 2]", "[x for x in [[1, 2], [3]]]",
        "[lambda: 1]", "[9 ** 9 ** 9]", "[2.0 ** 9999]", "[(-8) ** 0.5]", "[1 / 0]", "[1e400]", "[2 ** 54]",
        "[x for x in 3]",
        "[x for x in [1, 2] for y in [3]]", "[(x := 3)]", "[", "", "(" * 5000, "[" + "-" * 5000 + "1]", "[1, 2",
        "{{1: 2}}", "[0 ** -1]", "[-x for x in [[1]]]",
        "[[[[[1 for a in {nine}] for a in {nine}] for a in {nine}] for a in {nine}] for a in {nine}]",
        "[[[[[[] for a in {nine}] for a in {nine}] for a in {nine}] for a in {nine}] for a in {nine}]",
    ],
)  # fmt: skip
def test_nothing_else_is_evaluated(cfg, write, tmp_path, text):
    text = text.format(folder=tmp_path, nine=list(range(9)))
    file = write(EVAL % f'"{text}"')
    with pytest.raises(ConfigError) as error:
        load_config(cfg, file)
    assert str(error.value).startswith(f"config file {file}, line 1: not YAML that can be read safely: after the tag")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["3", "'[1]', '[2]'", "[[1]]", "{a: 1}", ""])
def test_a_tag_without_an_expression_is_refused(cfg, write, text):
    with pytest.raises(ConfigError, match=r'expected \["<list of numbers>"\].*got'):
        load_config(cfg, write(EVAL % text))


def test_aliases_that_stand_for_billions_are_refused(cfg, write):
    lines = ["SOLVER:", "  STEPS: &a0 [1, 2]"] + [
        f"  A{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 12)
    ]
    with pytest.raises(ConfigError, match="aliases stand for more than 100000 values"):
        load_config(cfg, write("\n".join(lines)))


def test_anchors_and_merged_mappings_mean_what_they_do_in_yaml(cfg, write):
    text = """
    MODEL:
      RPN: &box {SMOOTH_L1_BETA: 0.5, BBOX_REG_LOSS_WEIGHT: 2.0}
      ROI_BOX_HEAD:
        <<: *box
        BBOX_REG_LOSS_WEIGHT: 3.0
      FCOS: {NUM_CLASSES: &classes 7}
      RETINANET: {NUM_CLASSES: *classes}
    """
    load_config(cfg, write(text))
    head = cfg.MODEL.ROI_BOX_HEAD
    assert (head.SMOOTH_L1_BETA, head.BBOX_REG_LOSS_WEIGHT, cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT) == (0.5, 3.0, 2.0)
    assert (cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (7, 7)
    load_config(cfg, write("MODEL: {FCOS: {<<: [{NORM: a}, {NORM: b}]}}"))
    assert cfg.MODEL.FCOS.NORM == "a"
    with pytest.raises(ConfigError, match="line 1: <<: expected a mapping"):
        load_config(cfg, write("SOLVER: {<<: 3}"))


def test_an_empty_mapping_sets_nothing(cfg, write):
    assert load_config(cfg, write("SOLVER: {}")) == set()
    assert cfg == get_cfg()


def test_a_byte_order_mark_is_no_part_of_the_first_key(cfg, write):
    load_config(cfg, write(b"\xef\xbb\xbfOUTPUT_DIR: \xc3\xa9"))
    assert cfg.OUTPUT_DIR == "é"


@pytest.mark.parametrize(
    ("text", "got"),
    [("1", "1"), ("9", "9"), ("-2", "-2"), ("2.0", "float 2.0"), ("null", "null"), ("two", "str 'two'")],
)
def test_another_version_is_refused_before_its_keys(cfg, write, text, got):
    file = write(f"MODEL: {{WEIGHT: a.pkl}}\nVERSION: {text}\n")  # a key of version 1
    with pytest.raises(ConfigError, match=f"line 2: VERSION: expected .*, got {re.escape(got)}$"):
        load_config(cfg, file)
    with pytest.raises(ConfigError, match=f"^overrides: VERSION: expected .*, got {re.escape(got)}$"):
        load_config(cfg, write("VERSION: 2"), ["VERSION", text.replace("null", "None")])


def test_version_2_is_taken_as_number_and_as_text(cfg, write):
    load_config(cfg, write("VERSION: '2'"), ["VERSION", "2"])
    assert cfg.VERSION == 2


def test_bases_are_read_from_the_folder_of_the_file_that_names_them(cfg, write, tmp_path):
    (tmp_path / "more").mkdir()
    write("_BASE_: more/b.yaml\nSEED: 1", "a.yaml")
    write("_BASE_: ../c.yaml\nSEED: 2\nOUTPUT_DIR: b", "more/b.yaml")
    write("SEED: 3\nOUTPUT_DIR: c\nVIS_PERIOD: 3", "c.yaml")
    load_config(cfg, tmp_path / "a.yaml")
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.VIS_PERIOD) == (1, "b", 3)


def test_of_several_bases_the_later_ones_win(cfg, write):
    write("SEED: 1\nOUTPUT_DIR: one", "one.yaml")
    write("SEED: 2", "two.yaml")
    load_config(cfg, write("_BASE_: [one.yaml, two.yaml]"))
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (2, "one")


def test_null_may_follow_a_value_of_the_base(cfg, write):
    write("SOLVER: {WEIGHT_DECAY_BIAS: 0.5}", "base.yaml")
    load_config(cfg, write("_BASE_: base.yaml\nSOLVER: {WEIGHT_DECAY_BIAS: null}"))
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None


def test_files_that_are_each_others_bases_are_named(cfg, write, tmp_path):
    a = write("_BASE_: b.yaml", "a.yaml")
    b = write("_BASE_: [c.yaml]", "b.yaml")
    write("_BASE_: ./b.yaml", "c.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(cfg, a)
    chain = " -> ".join([str(a), str(b), f"{tmp_path}/c.yaml", f"{tmp_path}/./b.yaml"])
    assert str(error.value) == f"config file {a}: _BASE_ leads back to itself: {chain}"
    with pytest.raises(ConfigError, match="leads back to itself: .*self.yaml -> .*self.yaml$"):
        load_config(cfg, write("_BASE_: self.yaml", "self.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", r"nowhere.yaml \(a _BASE_ of .*config.yaml\): no such file"),
        (".", r"\(a _BASE_ of .*config.yaml\): cannot be read: Is a directory"),
        ("", "config.yaml, line 1: _BASE_: expected a file or a list of files"),
        ("''", "config.yaml, line 1: _BASE_: expected a file or a list of files"),
        ("[[a]]", "config.yaml, line 1: _BASE_: expected a file or a list of files"),
        ("{a: b}", "config.yaml, line 1: _BASE_: expected a file or a list of files"),
        ("https://a.org/b.yaml", "config.yaml, line 1: _BASE_: expected a file on this machine, got https://a.org/b"),
        ("empty.yaml", "empty.yaml: expected a mapping of keys to values, got nothing"),
        ("wrong.yaml", "wrong.yaml, line 2: unknown key GAMMA"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(cfg, write, base, message):
    write("", "empty.yaml")
    write("SEED: 1\nGAMMA: 2", "wrong.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(cfg, write(f"_BASE_: {base}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SEED", "1", "--resume"], "expected KEY VALUE pairs, got --resume; options stand before the first KEY"),
        (["SEED", "1", "--num-gpus", "2"], "expected KEY VALUE pairs, got --num-gpus; options stand before"),
        (["OUTPUT_DIR", "--eval-only"], "expected KEY VALUE pairs, got --eval-only; options stand before"),
        (["SEED=1"], "expected KEY VALUE pairs, got SEED=1; write SEED 1"),
        (["SEED", "1", "OUTPUT_DIR=a", "b"], "expected KEY VALUE pairs, got OUTPUT_DIR=a; write OUTPUT_DIR a"),
        (["SEED", "1", "OUTPUT_DIR"], "expected KEY VALUE pairs, got 3 words: SEED 1 OUTPUT_DIR"),
        (["_BASE_", "a.yaml"], "_BASE_ stands in files only, got _BASE_ a.yaml"),
        (["SOLVER", "1"], f"SOLVER: expected a section of keys {SOME}, got '1'"),
        (["SOLVER.GAMMA.A", "1"], "unknown key SOLVER.GAMMA.A; did you mean SOLVER.GAMMA?"),
        (["solver.gamma", "1"], "unknown key solver.gamma; did you mean SOLVER.GAMMA?"),
        (["", "1"], "unknown key "),
        (["_DELETE_", "True"], "unknown key _DELETE_"),
    ],
)
def test_overrides_that_are_no_pairs_of_key_and_value_are_refused(cfg, write, words, message):
    with pytest.raises(ConfigError) as error:
        load_config(cfg, write("{}"), words)
    assert str(error.value).startswith(f"overrides: {message}")


def test_the_last_of_two_overrides_wins_and_a_value_may_be_negative(cfg, write):
    load_config(cfg, write("SEED: 3"), ["SEED", "1", "SEED", "-2", "OUTPUT_DIR", "a=b"])
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (-2, "a=b")


def test_a_missing_file_is_named_with_one_like_it(cfg, tmp_path, write, monkeypatch):
    write("{}", "fcos_dyhead_R50.yaml")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*/fcos_dyhead_R50\.yaml\?$"):
        load_config(cfg, tmp_path / "fcos_dyhed_R50.yaml")
    with pytest.raises(ConfigError, match=r"no such file$"):
        load_config(cfg, tmp_path / "something_else.yaml")
    monkeypatch.chdir(ROOT)
    quickstart = "configs/quickstart/fcos_dyhead_R18_shapes.yaml"
    with pytest.raises(ConfigError, match=rf"no such file; did you mean {quickstart}\?$"):
        load_config(cfg, "configs/fcos_dyhead_R18_shapes.yaml")


@pytest.mark.parametrize(("name", "reason"), [("", "Is a directory"), ("a\0b", "null"), (400 * "x", "name too long")])
def test_what_cannot_be_a_config_file_is_refused(cfg, tmp_path, name, reason):
    with pytest.raises(ConfigError, match=rf"^config file .*: cannot be read: .*{reason}"):
        load_config(cfg, f"{tmp_path}/{name}")


def test_the_home_folder_stands_for_its_sign_in_every_path(cfg, write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("DATASETS: {REGISTER: [['~a', ~/a.json, ~/images]]}\nOUTPUT_DIR: ~/run", "base.yaml")
    write("_BASE_: ~/base.yaml")
    load_config(cfg, "~/config.yaml", ["MODEL.WEIGHTS", "~/a.pth"])
    assert cfg.OUTPUT_DIR == f"{tmp_path}/run"
    assert cfg.MODEL.WEIGHTS == f"{tmp_path}/a.pth"
    assert cfg.DATASETS.REGISTER == [["~a", f"{tmp_path}/a.json", f"{tmp_path}/images"]]


PIECES = ["null", "", "~", "1e400", "0x" + 5000 * "f", "-1", "1_000", "010", "1:30", "yes", "2020-01-01", "[", "]",
          "{", "}", "()", "(1,)", "&a", "*a", "<<: *a", "!!str", "!!python/name:os.system", "---", "\t", "\ufeff", "\0",
          "\x85", "'", '"',
          '"\\ud800"', "|", "#", "? ", ": ", "- ", ",", "@", "\n", "_BASE_: x", "nan", ".inf", "1j", "b'x'", 300 * "(",
          600 * "[", 3000 * "1+", "{1: 2}", "١", 5000 * "1", "[1, [2, (3,)], None]", "%YAML 9.9\n"]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_text_whatever_gives_anything_but_a_config_error_that_says_where(write, seed):
    rng, keys = random.Random(seed), sorted(key_names(get_cfg()))
    errors = []
    text = (ROOT / "configs/base_rcnn.yaml").read_text()
    for _ in range(40):
        content, words = "{}", []
        if rng.random() < 0.6:
            content = list(text)
            for _ in range(rng.choice([1, 2, 5])):
                place = rng.randrange(len(content))
                content[place : place + rng.choice([0, 1, 20])] = rng.choice(PIECES)
            content = "".join(content)
        else:
            words = [rng.choice(keys), rng.choice(PIECES)]
        try:
            load_config(get_cfg(), write(content), words)
        except ConfigError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert [error for error in errors if not re.search(r"config\.yaml|^overrides: |/x: no such file", error)] == []


def key_names(tree, prefix=""):
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from key_names(value, f"{prefix}{name}.")


@pytest.mark.detectron2
def test_files_mean_what_they_mean_to_detectron2():
    """All shipped ones, and those of Detectron2 itself."""
    import detectron2.model_zoo
    from detectron2.config import get_cfg as detectron2_cfg

    from dyhead.config import add_dyhead_config

    theirs = Path(detectron2.model_zoo.__file__).parent / "configs"
    files = [*(ROOT / "configs").rglob("*.yaml"), *theirs.glob("COCO-*/*R_50_FPN_1x.yaml"), *theirs.glob("Misc/*.yaml")]
    files += theirs.glob("Base-*.yaml")
    compared = 0
    for file in files:
        ours = add_dyhead_config(detectron2_cfg())
        expected = ours.clone()
        load_config(ours, file)
        expected.merge_from_file(str(file), allow_unsafe=True)
        assert ours == expected, file
        assert ours.dump() == expected.dump(), file
        compared += 1
    assert compared > len(list((ROOT / "configs").rglob("*.yaml"))) + 10
