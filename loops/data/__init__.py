"""The commands `captioner data ...`: look at data sets, make training sets of them, write other formats."""
