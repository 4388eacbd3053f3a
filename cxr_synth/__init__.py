"Do synthetic chest X-rays improve a pneumonia classifier, and by how much?"
__version__ = "0.0.1"

import os as _os
from importlib import import_module as _import_module

# Threads that wait for each other look often before they sleep; beside another busy program each look costs
# a core. GNU's library reads this once, when torch is loaded; `benchmarks/busy.py` measures it.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & _os.environ.keys():
    _os.environ["GOMP_SPINCOUNT"] = "10000"

_HOME = {  # public name -> the module that holds it; imported when the name is first used
    # a study from Python
    "CxrError": "base.files",
    "Study": "base.records",
    "run": "stages.run",
    "run_stage": "stages.run",
    # the stages, in their order
    "stage_data": "stages.data",
    "stage_plan": "stages.plan",
    "stage_train": "stages.train",
    "stage_generate": "stages.generate",
    "stage_quality": "stages.quality",
    "stage_experiments": "stages.classify",
    "open_test": "stages.classify",
    "stage_report": "stages.report",
    "stage_guide": "guide",
    # the guide's own names, with its arguments
    "prepare_training_data": "stages.data",
    "train_dreambooth": "diffusion.command",
    "generate_class_images": "diffusion.dreambooth",
    "load_finetuned_model": "diffusion.sampling",
    "generate_synthetic_dataset": "diffusion.sampling",
    "calculate_fid": "quality.folders",
    "create_comparison_grid": "quality.folders",
    "ChestXrayDataset": "guide",
    "get_transforms": "guide",
    "PneumoniaClassifier": "guide",
    "count_parameters": "classify.finetune",
    "train_classifier": "guide",
    "run_all_experiments": "guide",
    "analyze_and_print_results": "report.guide_table",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted(__all__)
