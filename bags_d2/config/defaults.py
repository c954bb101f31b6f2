"""Every configuration key that this package adds to Detectron2's."""

from detectron2.config import CfgNode


def add_bags_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    The defaults leave every stock model as it is: nothing changes before a YAML selects
    ``MODEL.ROI_HEADS.NAME: LongTailROIHeads`` or ``LongTailCascadeROIHeads``.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    from .. import _register

    _register()  # the names that a config may hold

    # The classifier of the RoI heads, from ROI_BOX_PREDICTOR_REGISTRY. "FastRCNNOutputLayers" is
    # Detectron2's own (softmax, or sigmoid by MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE).
    cfg.MODEL.ROI_BOX_PREDICTOR = CfgNode()
    cfg.MODEL.ROI_BOX_PREDICTOR.NAME = "BAGSOutputLayers"
    # Cosine classifier: weights and features are normalised, and cosines scaled by TEMPERATURE.
    cfg.MODEL.ROI_BOX_PREDICTOR.NORMALIZED = False
    cfg.MODEL.ROI_BOX_PREDICTOR.TEMPERATURE = 20.0
    # Start stage 2 with a new classifier where MODEL.WEIGHTS has one that would fit (cRT).
    cfg.MODEL.ROI_BOX_PREDICTOR.REINITIALIZE = False

    cfg.MODEL.LONG_TAIL = CfgNode()
    # What is counted for a class: its "instances" (annotations; the paper) or its "images".
    cfg.MODEL.LONG_TAIL.COUNT_BY = "instances"
    # JSON with the training count of each class: a list in contiguous class order, or an object
    # {class name: count}. "" counts the data sets of DATASETS.TRAIN.
    cfg.MODEL.LONG_TAIL.CLASS_COUNTS_FILE = ""
    # What a cascade averages over its stages: raw "logits" (the authors) or "probs" (Detectron2).
    cfg.MODEL.LONG_TAIL.CASCADE_AVERAGE = "logits"

    cfg.MODEL.BAGS = CfgNode()
    # Edges of the half-open bins of training count that make the foreground groups: (10, 100,
    # 1000) is [0, 10) [10, 100) [100, 1000) [1000, inf). Strictly increasing; () is one group.
    cfg.MODEL.BAGS.GROUP_THRESHOLDS = (10, 100, 1000)
    # beta: "others" RoIs drawn for each foreground RoI of a group. .inf uses all, 0.0 none.
    cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO = 8.0
    # How the groups' softmaxes become class scores: by the "paper", each group for itself, or
    # "joint", all classes in one softmax relative to their groups' "others". Both need no training.
    cfg.MODEL.BAGS.MERGE = "paper"
    # What these three of MODEL.LONG_TAIL were called before, still read; "" is not set.
    cfg.MODEL.BAGS.COUNT_BY = ""
    cfg.MODEL.BAGS.CLASS_COUNTS_FILE = ""
    cfg.MODEL.BAGS.CASCADE_AVERAGE = ""

    # ReweightedOutputLayers: class weights "inverse" to the training counts, or of the
    # "effective_number" of samples (1 - BETA^n) / (1 - BETA); mean 1, then clipped to CLIP.
    cfg.MODEL.REWEIGHT = CfgNode()
    cfg.MODEL.REWEIGHT.SCHEME = "inverse"
    cfg.MODEL.REWEIGHT.BETA = 0.999
    cfg.MODEL.REWEIGHT.CLIP = (0.1, 5.0)

    # FocalOutputLayers: weight of well classified RoIs (1 - p)^GAMMA, GAMMA 0.0 or at least 1.0;
    # of positives ALPHA, of negatives 1 - ALPHA (a negative ALPHA weighs neither).
    cfg.MODEL.FOCAL_LOSS = CfgNode()
    cfg.MODEL.FOCAL_LOSS.GAMMA = 2.0
    cfg.MODEL.FOCAL_LOSS.ALPHA = 0.25

    # BalancedSoftmaxOutputLayers: in training, TAU times the log of the class priors is added to
    # the logits. 1.0 is balanced softmax, 0.0 softmax.
    cfg.MODEL.BALANCED_SOFTMAX = CfgNode()
    cfg.MODEL.BALANCED_SOFTMAX.TAU = 1.0

    # SeesawOutputLayers: exponents of the mitigation (P) and compensation (Q) factors.
    cfg.MODEL.SEESAW = CfgNode()
    cfg.MODEL.SEESAW.P = 0.8
    cfg.MODEL.SEESAW.Q = 2.0

    # EQLOutputLayers: classes in a smaller share of the training images than FREQUENCY_THRESHOLD
    # are spared the negatives of other classes.
    cfg.MODEL.EQL = CfgNode()
    cfg.MODEL.EQL.FREQUENCY_THRESHOLD = 0.00176

    # EQLv2OutputLayers: steepness and middle of the map from the ratio of accumulated positive
    # and negative gradients to the weights of negatives; extra weight of positives.
    cfg.MODEL.EQLV2 = CfgNode()
    cfg.MODEL.EQLV2.GAMMA = 12.0
    cfg.MODEL.EQLV2.MU = 0.8
    cfg.MODEL.EQLV2.ALPHA = 4.0

    # Of version 0.5, whose configs are still read; `bags-d2 calibrate` took its place.
    cfg.register_deprecated_key("MODEL.NORCAL")

    # Names of the parameters to train, as globs against model.named_parameters(); all others are
    # frozen, and BatchNorm layers without a trainable parameter keep their statistics. Every glob
    # must match something. () trains everything that the model itself leaves trainable.
    cfg.MODEL.TRAINABLE_PARAMS = ()
    # Leave out of training steps what reaches no trainable parameter: losses of frozen parts, and
    # the mask head. What trains, trains the same way; False runs everything, to log all losses.
    cfg.MODEL.SKIP_FROZEN = True

    # Stage 2 trains a detector on from a baseline's weights. A method's file turns it on; then
    # WEIGHTS, MAX_ITER and STEPS of the baseline's file become MODEL.WEIGHTS, SOLVER.MAX_ITER and
    # SOLVER.STEPS before the method's own keys. "" is model_final.pth in the baseline's OUTPUT_DIR,
    # 0 its own schedule. Read in files only.
    cfg.STAGE2 = CfgNode()
    cfg.STAGE2.ENABLED = False
    cfg.STAGE2.WEIGHTS = ""
    cfg.STAGE2.MAX_ITER = 0
    cfg.STAGE2.STEPS = ()

    # Multiplies SOLVER.MAX_ITER and SOLVER.STEPS once, when the config is read; then it is 1.0.
    cfg.SOLVER.SCHEDULE_FACTOR = 1.0
    # How many training steps with an infinite or NaN loss to leave out, in all, before training
    # stops with an error. Such a step never reaches the weights.
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0

    # Data sets to register: rows (name, kind, annotation file or folder, folder of images), for use
    # in DATASETS.TRAIN and DATASETS.TEST. Kinds are "coco", "lvis", "yolo", "voc" and "labelme"
    # (docs/datasets.md).
    cfg.DATASETS.REGISTER = ()
    # Check annotation files for faults before training and evaluation. Of the size of LVIS's that
    # takes half a minute.
    cfg.DATASETS.CHECK_ANNOTATIONS = True

    # DATALOADER.SAMPLER_TRAIN may also be "ClassBalancedTrainingSampler" (an image of a class that
    # is drawn evenly), "InstanceAwareRepeatFactorTrainingSampler" (IRFS, with REPEAT_THRESHOLD),
    # "ExponentialRepeatFactorTrainingSampler" (E-IRFS, with REPEAT_THRESHOLD and this alpha) ...
    cfg.DATALOADER.REPEAT_ALPHA = 2.0
    # ... or "TailTrainingSampler": images that show a class of fewer training instances than this.
    cfg.DATALOADER.TAIL_MAX_COUNT = 100

    # The classes of a test set are matched by name with those that the model was trained on, in any
    # order. Where either has classes that the other lacks, evaluate those in common.
    cfg.TEST.COMMON_CLASSES_ONLY = False

    # Also measure AP-fixed on LVIS: the best DETECTIONS_PER_CLASS of each class over the data set
    # count, however many an image has. TEST.DETECTIONS_PER_IMAGE should then be large; the usual
    # measures take the best 300 of an image in any case.
    cfg.TEST.LVIS_AP_FIXED = False
    cfg.TEST.DETECTIONS_PER_CLASS = 10000
