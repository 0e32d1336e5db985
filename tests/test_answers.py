"""The final answer of a text is found, and compared, or rejected rather than guessed."""

from __future__ import annotations

import pytest

from stllms import tasks


class TestReadAnswer:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("The answer is 42.", "42"),
            ("The answer is 412.5 grams. That is all.", "412.5 grams"),
            ("So the final answer is: **22:02**.", "22:02"),
            ("**Answer:** Thursday\n\nThis follows from 100 = 14 x 7 + 2.", "Thursday"),
            ("## Final Answer\n\n7/12", "7/12"),
            ("The answer to 17 times 24 is 408", "408"),
            ("Answer: 5\n\nWait, I slipped.\n\nAnswer: 6", "6"),
            (r"Thus \boxed{7} is not it, but \boxed{\frac{7}{12}} is.", "7/12"),
            (r"\[ \boxed{\text{Cal}} \]", "Cal"),
            (r"The total is $\boxed{1{,}332}$.", "1332"),
            (
                "We add.\n\nTherefore it costs **6.35 euros** in the end, as promised.",
                "6.35 euros",
            ),
            ("17 * 24 - 19 * 12 = 408 - 228 = 180", "180"),
            ("Adding it all up, the youngest of the four is Oli.", "Oli"),
            (
                "After all of that counting there were exactly 15 handshakes",
                "15",
            ),
            ("By this method one obtains 600 pages without any doubt", "600"),
            (
                "No, because each move keeps the parity.",
                "No, because each move keeps the parity",
            ),
            ("I don't think the answer is 5. I count six.\n\nAnswer: 6", "6"),
            ("If the answer is 5, we fail. The sum is 6", "The sum is 6"),
            ("<think>The answer is 5.</think>\nThe answer is 6.", "6"),
            ("The opening tag was in the prompt: 5</think>6", "6"),
            ("42", "42"),
        ],
    )
    def test_finds_the_final_answer(self, text, answer):
        assert tasks.read_answer(text) == answer

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " \n ",
            "<think>The answer is 5.",
            "</think>",
            r"\boxed{}",
            "Five printers of that kind then print 600 pages every 4 minutes",
            "It follows that one should think about this a good deal longer",
        ],
    )
    def test_says_none_rather_than_guess(self, text):
        assert tasks.read_answer(text) is None

    def test_is_quick_on_long_and_broken_text(self):
        for text in ("\\boxed{" * 3000, "answer to " * 20_000, "9" * 20_000):
            assert not tasks.is_correct(text, "5")


class TestIsCorrect:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("180", "180"),
            ("The answer is 180.0.", "180"),
            ("The answer is $1.50.", "1.50"),
            ("The answer is 1.5 euros per pen.", "1.50"),
            (r"\boxed{\$540.80}", "540.80"),
            (r"\boxed{1{,}080 \text{ ml}}", "1080"),
            (r"\boxed{4\,000\,\text{g}}", "4000"),
            ("Answer: 4,000 grams", "4000"),
            ("Answer: 4 000 g", "4000"),
            (r"\boxed{102 \text{ m}^2}", "102"),
            ("Answer: 102 m²", "102"),
            (r"\boxed{120^\circ}", "120"),
            ("Answer: 120°", "120"),
            ("Answer: −5 degrees", "-5"),
            ("Answer: minus five", "-5"),
            (r"\boxed{-\frac{1}{2}}", "-0.5"),
            (r"\boxed{\dfrac{14}{24}}", "7/12"),
            (r"\boxed{\frac7{12}}", "7/12"),
            ("Answer: 2 1/2", "2.5"),
            (r"\boxed{2\tfrac12}", "5/2"),
            ("Answer: .5", "1/2"),
            ("Answer: 25%", "25"),
            ("Answer: 25 per cent", "1/4"),
            (r"\boxed{25\%}", "0.25"),
            ("Answer: six", "6"),
            ("There are six of them.", "6"),
            ("On the 8th day.", "8"),
            ("Answer: day eight", "8"),
            ("x = 36", "36"),
            ("The answer is 15, because each of 6 people meets 5 others, not 6.", "15"),
            ("Answer: 26 (a Tuesday)", "26"),
            ("The letter s occurs 6 times between the two others.", "6"),
            ("The answer is 6 times.", "6"),
            ("Answer: 15, not 30.", "15"),
            ("Answer: 10:02 pm", "22:02"),
            ("Answer: 10:02 P.M.", "22:02"),
            ("At 9:00.", "09:00"),
            ("Answer: 12:05 am", "00:05"),
            ("Answer: Yes.", "yes"),
            ("No, it need not be.", "no"),
            ("So the result is no", "no"),
            ("**NO**", "no"),
            ("It was Cal.", "Cal"),
            ("The answer is that Cal did it.", "Cal"),
            ("The answer is a liar.", "liar"),
            ("The answer is that B is a liar.", "liar"),
            ("The answer is the letter N.", "N"),
            ('The answer is "frog".', "frog"),
            (r"\boxed{\text{Saturday}}", "Saturday"),
            ("It will be on a SATURDAY!", "saturday"),
            ("Answer: A", "a"),
        ],
    )
    def test_accepts_the_same_answer_in_another_form(self, text, answer):
        assert tasks.is_correct(text, answer)

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("The answer is not 5.", "5"),
            ("I do not think that the answer is 5.", "5"),
            ("If the answer is 5, then pigs can fly over the whole town of mine.", "5"),
            ("The answer is 5 or 6.", "5"),
            ("The answer is 5 and 6.", "5"),
            ("The answer is more than 5.", "5"),
            ("The answer is about 5.", "5"),
            ("The answer is at least 5.", "5"),
            ("The answer is just over 5.", "5"),
            ("Answer: twenty-five", "5"),
            ("Answer: ~5", "5"),
            (r"\boxed{\approx 5}", "5"),
            (r"\boxed{x \leq 5}", "5"),
            (r"\boxed{\sqrt{5}}", "5"),
            (r"\boxed{5\pi}", "5"),
            (r"\boxed{5^2}", "5"),
            ("Answer: 5^2", "5"),
            (r"\boxed{2 \cdot 5}", "5"),
            ("Answer: 5 thousand", "5"),
            ("Answer: 5 and a half", "5"),
            ("Answer: 2 1/2", "2"),
            ("Answer: 15", "5"),
            ("Answer: 5.1", "5"),
            ("Answer: 5,1", "5"),
            ("Answer: 5, 6", "5"),
            ("Answer: 5/6", "5"),
            ("Answer: 5/0", "5"),
            ("Answer: 5-7", "5"),
            ("Answer: -5", "5"),
            ("Answer: 0.58", "7/12"),
            ("Answer: 0.5833333", "7/12"),
            ("Answer: 1.234", "1234"),
            ("Answer: 1,23", "123"),
            ("Answer: 12,345,67", "1234567"),
            ("Answer: A5", "5"),
            ("Answer: 5:00", "5"),
            ("Answer: 50%", "5"),
            ("Answer: 3*4", "34"),
            ("Answer: 10:02", "22:02"),
            ("Answer: 10:02 am", "22:02"),
            ("Answer: 22:02 or 22:03", "22:02"),
            ("Answer: 2202", "22:02"),
            ("Yes and no.", "yes"),
            ("Yes, or rather no.", "yes"),
            ("Not yes.", "yes"),
            ("Nobody knows.", "no"),
            ("Answer: not Cal", "Cal"),
            ("Answer: Cal or Ben", "Cal"),
            ("Answer: Cal and Ben", "Cal"),
            ("Answer: Cal (or Ben)", "Cal"),
            ("Answer: Cal's brother", "Cal"),
            ("Answer: everyone but Cal", "Cal"),
            ("Answer: Ben blames Cal", "Cal"),
            ("Answer: Calvin", "Cal"),
            ("Answer: truth-teller", "liar"),
            ("Answer: greenish", "green"),
            ("Answer: green, white", "green"),
            ("Answer: the", "n"),
            ("<think>The answer is 5.", "5"),
            ("The answer is 5.</think>The answer is 6.", "5"),
            ("", "5"),
        ],
    )
    def test_rejects_what_is_not_the_answer(self, text, answer):
        assert not tasks.is_correct(text, answer)

    def test_no_two_different_answers_are_taken_for_one(self):
        given = {task.answer.casefold() for task in tasks.load("checkable")}
        for one in given:
            assert [other for other in given if tasks.same(one, other)] == [one]
