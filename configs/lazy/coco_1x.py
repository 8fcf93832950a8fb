"""COCO, SGD and the 1x schedule, for the other files to import."""

from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.01
train = model_zoo.get_config("common/train.py").train
