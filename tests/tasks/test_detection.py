import math

import pytest
import torch
from builders import picture
from pycocotools.coco import COCO
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.answers import TokenCertainty, greedy_answers, prompt_inputs
from vlmoe.tasks.boxes import LabeledBox, boxes_as_text, parse_boxes
from vlmoe.tasks.detection import detection_scores, detections, iou, object_scores


def text(*objects):
    return boxes_as_text([LabeledBox(label, corners) for label, *corners in objects])


CAT, DOG, FAR = ("cat", 0, 0, 200, 200), ("dog", 300, 300, 600, 700), ("cat", 800, 800, 900, 1000)
RIGHT = [text(CAT, DOG), text(FAR), text()]


def test_perfect_answers_score_one():
    scores = detection_scores(RIGHT, RIGHT)
    assert scores.as_dict() == {
        "ap": 1.0,
        "ap50": 1.0,
        "precision50": 1.0,
        "recall50": 1.0,
        "precision50_any_class": 1.0,
        "recall50_any_class": 1.0,
        "unparsable": 0.0,
    }


def test_one_box_missing_costs_what_the_definition_says():
    # cats: recall 1/2 at precision 1; 51 of COCO's 101 recalls (0, 0.01, ..., 0.5) are reached
    scores = detection_scores([text(CAT, DOG), text(), text()], RIGHT)
    assert scores.ap50 == pytest.approx((51 / 101 + 1) / 2)
    assert scores.ap == pytest.approx((51 / 101 + 1) / 2)
    assert (scores.precision50, scores.recall50) == (1.0, pytest.approx(2 / 3))


def test_a_shifted_box_counts_up_to_its_overlap():
    shifted = ("cat", 40, 0, 240, 200)  # IoU 160 / 240 = 0.667: right at 0.5, 0.55, 0.6, 0.65
    assert iou(shifted[1:], CAT[1:]) == pytest.approx(2 / 3)
    scores = detection_scores([text(shifted)], [text(CAT)])
    assert (scores.ap50, scores.ap) == (pytest.approx(1), pytest.approx(0.4))
    assert (scores.precision50, scores.recall50) == (1.0, 1.0)


def test_a_wrong_class_counts_only_without_classes():
    scores = detection_scores([text(("Cat ", *DOG[1:]))], [text(DOG)])
    assert (scores.ap50, scores.precision50, scores.recall50) == (0.0, 0.0, 0.0)
    assert (scores.precision50_any_class, scores.recall50_any_class) == (1.0, 1.0)
    assert detection_scores([text(("DOG ", *DOG[1:]))], [text(DOG)]).ap == pytest.approx(1)


def test_the_order_of_the_scores_decides_average_precision():
    answers, wrong = [text(CAT), text(CAT)], ("cat", 500, 0, 600, 100)
    answers[1] = text(wrong)
    references = [text(CAT), text(FAR)]
    # the wrong box last: precision 1 up to recall 1/2; first: precision 1/2 up to recall 1/2
    last = detection_scores(answers, references, [[0.9], [0.1]])
    first = detection_scores(answers, references, [[0.1], [0.9]])
    assert last.ap50 == pytest.approx(51 / 101)
    assert first.ap50 == pytest.approx(51 / 101 / 2)
    assert last.precision50 == first.precision50 == 0.5


def test_a_box_is_matched_once_and_by_the_one_that_overlaps_most():
    near = ("cat", 20, 0, 220, 200)
    scores = detection_scores([text(CAT, near)], [text(CAT)])
    assert (scores.precision50, scores.recall50) == (0.5, 1.0)


def test_the_share_of_unparsable_answers_is_counted_and_their_objects_too():
    cut = text(CAT, DOG)[:-30]
    assert len(parse_boxes(cut).objects) == 1
    scores = detection_scores([cut, "a cat", text(), text()], [text(CAT), text(DOG), "[]", "[]"])
    assert scores.unparsable == 0.5
    assert (scores.precision50, scores.recall50) == (1.0, 0.5)


def test_a_box_with_no_area_is_a_wrong_box():
    flat = ("cat", 0, 0, 0, 200)
    scores = detection_scores([text(CAT, flat)], [text(CAT)], [[0.2, 0.8]])
    order = [each.corners for each in parse_boxes(text(CAT, flat)).objects]
    assert order[0] == (0, 0, 0, 200)
    scores = detection_scores([text(CAT, flat)], [text(CAT)], [[0.8, 0.2]])
    assert scores.precision50 == 0.5
    assert scores.ap50 == pytest.approx(0.5)


def test_bad_lists_are_errors():
    with pytest.raises(ValueError, match="no box"):
        detection_scores(["[]"], ["[]"])
    with pytest.raises(ValueError, match=r"reference 1 .*a cat"):
        detection_scores([text(CAT), "[]"], [text(CAT), "a cat"])
    with pytest.raises(ValueError, match="1 boxes, but 2 scores"):
        detection_scores([text(CAT)], [text(CAT)], [[0.1, 0.2]])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        detection_scores([text(CAT), "[]"], [text(CAT)])


def test_nothing_is_printed(capsys):
    detection_scores(RIGHT, RIGHT)
    assert capsys.readouterr().out == ""


def test_average_precision_equals_coco_on_made_boxes():
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 400, (40, 3, 4), generator=generator)
    labels = [["a", "b", "c"][i] for i in torch.randint(0, 3, (120,), generator=generator)]
    noise = torch.randint(-60, 60, (40, 3, 4), generator=generator)
    values = torch.rand(40, 3, generator=generator)
    truth, found, scores = [], [], []
    images = {"images": [{"id": i} for i in range(40)]}
    images["categories"] = [{"id": i} for i in (1, 2, 3)]
    right, given = [], []
    for i in range(40):
        right.append([])
        given.append([])
        for j in range(3):
            x, y, w, h = (int(each) for each in numbers[i, j])
            corners = (x, y, x + w + 100, y + h + 100)
            moved = [int(a + b) for a, b in zip(corners, noise[i, j], strict=True)]
            moved = [min(max(each, 0), 1000) for each in moved]
            label = labels[3 * i + j]
            right[-1].append(LabeledBox(label, corners))
            given[-1].append((LabeledBox(label, tuple(moved)), float(values[i, j])))
        given[-1].sort(key=lambda each: (*each[0].corners, each[0].label))
        scores.append([score for _, score in given[-1]])
        for boxes, into in ((right[-1], truth), ([each for each, _ in given[-1]], found)):
            for place, each in enumerate(boxes):
                left, top, r, b = each.corners
                entry = {"image_id": i, "category_id": "abc".index(each.label) + 1, "iscrowd": 0}
                entry |= {"bbox": [left, top, r - left, b - top], "area": (r - left) * (b - top)}
                entry |= {"id": len(into) + 1, "score": scores[-1][place] if into is found else 1}
                into.append(entry)
    reference, result = COCO(), None
    reference.dataset = {**images, "annotations": truth}
    reference.createIndex()
    result = reference.loadRes(found)
    coco = COCOeval(reference, result, "bbox")
    coco.evaluate(), coco.accumulate(), coco.summarize()
    texts = (
        [boxes_as_text(each) for each in right],
        [boxes_as_text([one for one, _ in each]) for each in given],
    )
    ours = detection_scores(texts[1], texts[0], scores)
    assert 0.1 < ours.ap < ours.ap50 < 1
    assert (ours.ap, ours.ap50) == (coco.stats[0], coco.stats[1])


def test_detections_have_the_form_of_transformers_detection_models():
    found = detections(text(CAT, DOG), (640, 480), [0.5, 0.25], {"dog": 7})
    assert found["boxes"].tolist() == [[0, 0, 128, 96], [192, 144, 384, 336]]
    assert found["scores"].tolist() == [0.5, 0.25]
    assert found["labels"].tolist() == [-1, 7]
    assert found["text_labels"] == ["cat", "dog"]
    nothing = detections("no", (640, 480))
    assert [nothing[key].shape for key in ("scores", "labels", "boxes")] == [(0,), (0,), (0, 4)]
    assert nothing["labels"].dtype == torch.long
    assert detections(text(CAT, DOG, FAR), (9, 9))["labels"].tolist() == [0, 1, 0]


def test_an_objects_score_is_the_geometric_mean_of_its_tokens_probabilities():
    pieces = [
        "[",
        '{"bbox_2d": [',
        "1, 2,",
        ' 3, 4], "label"',
        ': "cat"}, {"b',
        'box_2d": [5, 6, 7',
    ]
    pieces += [', 8], "label": "dog"', "}", "]", "<end>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({piece: at for at, piece in enumerate(pieces)})),
        eos_token="<end>",
    )
    tokenizer._tokenizer.decoder = Fuse()
    chances = [0.9, 0.5, 0.25, 0.125, 0.0625, 0.5, 0.5, 0.5, 0.1, 0.2]
    logs = [math.log(each) for each in chances]
    cat, dog = object_scores(range(10), logs, tokenizer)
    assert cat == pytest.approx((0.5 * 0.25 * 0.125 * 0.0625) ** (1 / 4))  # tokens 1 to 4
    assert dog == pytest.approx((0.0625 * 0.5 * 0.5 * 0.5) ** (1 / 4))  # tokens 4 to 7
    assert object_scores(range(5), logs, tokenizer) == [cat]  # cut off
    assert object_scores([0, 8], logs, tokenizer) == []


def test_a_byte_level_tokenizers_objects_have_scores_of_their_own_tokens(tokenizer):
    answer = text(("é{cat}", 1, 2, 3, 4), ("dog", 5, 6, 7, 8))
    first = answer.index("}, {") + 1
    tokens = tokenizer(answer).input_ids
    lengths = [len(tokenizer.decode(tokens[: end + 1])) for end in range(len(tokens))]
    logs = [-1.0 if end <= first else -2.0 for end in lengths]
    scores = object_scores(tokens, logs, tokenizer)
    assert scores[0] == pytest.approx(math.exp(-1), rel=0.05)
    assert scores[1] == pytest.approx(math.exp(-2), rel=1e-5)


def test_the_recorded_log_probabilities_are_those_of_generates_scores(saved_model):
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model).eval()
    processor = VLMoEProcessor.from_pretrained(saved_model)
    inputs = prompt_inputs(processor, "what color is the shape?", [picture()])
    recorder = TokenCertainty()
    tokens = greedy_answers(model, processor.tokenizer, inputs, 6, recorder)
    out = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    assert torch.equal(out.sequences[:, -tokens.shape[1] :], tokens)
    expected = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(recorder.log_probabilities(), expected)
