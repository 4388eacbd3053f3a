"Do synthetic chest X-rays improve a pneumonia classifier, and by how much?"
__version__ = "0.0.1"

_home = dict(  # public name -> the module that holds it, imported when the name is first used: `import cxr_synth` itself loads nothing
    CxrError="core", Study="core", prepare_training_data="data", train_dreambooth="dreambooth", generate_class_images="dreambooth", load_finetuned_model="generate",
    generate_synthetic_dataset="generate", calculate_fid="quality", create_comparison_grid="quality", analyze_and_print_results="analysis",
    ChestXrayDataset="guide", get_transforms="guide", PneumoniaClassifier="guide", count_parameters="training", train_classifier="guide", run_all_experiments="guide")
__all__ = list(_home)

def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = found = getattr(import_module(f"{__name__}.{_home[name]}"), name)
    return found

def __dir__(): return sorted({*globals(), *_home})
