"""KL divergence or trust region? One experiment: a language with an exact judge, and a learned reward with a blind spot.

    make question-quick     the four corners, clip on and off by KL on and off
    make question           those again, the beta sweep and the estimator sweep, three seeds
    make figures            the pictures and tables of docs/question-results.md, from what was measured

Nothing here trains: the base is `rlkl sft`, the pairs are `rlkl label`, every arm is `train.py` on configs/question.yaml.
"""
