"""KL divergence or trust region? An experiment: a language with an exact judge, a learned reward with a blind spot.

    make question-quick     the four corners, clip on and off by KL on and off
    make question           those again, the beta sweep and the estimator sweep, three seeds
    make figures            the pictures and tables of docs/question-results.md, from what was measured

The base is made by `rlkl sft`, the pairs by `rlkl label`; every arm is `train.py configs/question.yaml` with overrides.
"""
