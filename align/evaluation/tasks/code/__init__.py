"""Tasks whose answer is a program, which unit tests check: HumanEval, MBPP, and their forms of EvalPlus."""
