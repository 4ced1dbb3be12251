"""Factors that replace a conv: fitted to moments of its inputs and outputs, their errors known beforehand."""
