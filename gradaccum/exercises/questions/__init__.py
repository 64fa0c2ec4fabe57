"""The questions, one file each: q3_1.py is exercise 3.1; lesson_03.py is what the questions of lesson 3 share."""
