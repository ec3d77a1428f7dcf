"""KL divergence or trust region? An experiment with an exact judge and a reward with a blind spot.

    make question-quick     the four corners: clip on or off, KL on or off
    make question           those, a sweep over beta for each KL estimator, three seeds
    make figures            the pictures and tables of docs/question-results.md, from the results

    grammar.py       the language, and the gold score of a response
    bag_of_words.py  the reward: learned from preferences, blind to the order of words
    prepare.py       the base model, the preference pairs and the reward model
    arms.py          the runs of the experiment
    grid.py          runs them, and measures what each ends with
    tables.py        the tables of the pages
    figures.py       the pictures, with setting.py and simplex.py
    meter.py         what the detector of reward hacking says of the runs

The base is trained by `rlkl sft`, the pairs are made by `rlkl label`. Every arm is
`train.py configs/question.yaml` with overrides.
"""
