import json

from vlmoe.data.box_tokenizer import UNKNOWN, box_tokenizer

ANSWER = (
    '[{"bbox_2d": [0, 453, 1000, 7], "label": "red circle"}, '
    '{"bbox_2d": [1, 2, 3, 40], "label": "dog"}]'
)


def test_boxes_as_text_come_back_exactly_and_a_coordinate_is_one_token():
    tokenizer = box_tokenizer(["Find all objects.", "red circle", "dog"])
    for text in (ANSWER, "[]", "Find all objects."):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text
    tokens = tokenizer.tokenize(ANSWER)
    assert len(tokens) == 22
    assert tokens[1:8] == ["0", ", ", "453", ", ", "1000", ", ", "7"]
    assert json.loads("".join(tokens)) == json.loads(ANSWER)


def test_every_number_has_its_own_token_and_other_words_are_unknown():
    tokenizer = box_tokenizer(["dog"])
    numbers = tokenizer(" ".join(map(str, range(1001))), add_special_tokens=False).input_ids
    assert len({*numbers}) == 1002  # and the unknown blank
    assert tokenizer.tokenize("cat") == [UNKNOWN]


def test_the_tokenizer_comes_back_from_a_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = box_tokenizer(["a dog", "red circle"])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("<|user|>" + ANSWER + "<|end|>").input_ids
    assert again("<|user|>" + ANSWER + "<|end|>").input_ids == tokens
    assert again.decode(tokens, skip_special_tokens=True) == ANSWER
