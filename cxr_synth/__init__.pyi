"The names that `cxr_synth` finds when they are first used, for editors and type checkers; see `__init__.py`."

from .base.files import CxrError as CxrError
from .base.records import Study as Study
from .stages.run import run as run
from .stages.run import run_stage as run_stage
from .stages.data import stage_data as stage_data
from .stages.plan import stage_plan as stage_plan
from .stages.train import stage_train as stage_train
from .stages.generate import stage_generate as stage_generate
from .stages.quality import stage_quality as stage_quality
from .stages.classify import stage_experiments as stage_experiments
from .stages.classify import open_test as open_test
from .stages.report import stage_report as stage_report
from .guide import stage_guide as stage_guide
from .stages.data import prepare_training_data as prepare_training_data
from .diffusion.command import train_dreambooth as train_dreambooth
from .diffusion.dreambooth import generate_class_images as generate_class_images
from .diffusion.sampling import load_finetuned_model as load_finetuned_model
from .diffusion.sampling import generate_synthetic_dataset as generate_synthetic_dataset
from .quality.folders import calculate_fid as calculate_fid
from .quality.folders import create_comparison_grid as create_comparison_grid
from .guide import ChestXrayDataset as ChestXrayDataset
from .guide import get_transforms as get_transforms
from .guide import PneumoniaClassifier as PneumoniaClassifier
from .classify.finetune import count_parameters as count_parameters
from .guide import train_classifier as train_classifier
from .guide import run_all_experiments as run_all_experiments
from .report.guide_table import analyze_and_print_results as analyze_and_print_results

__version__: str
__all__: list[str]
