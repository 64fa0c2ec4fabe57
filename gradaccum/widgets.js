// Shown beside each view, once for each: where this does not run, the view works all the same.
(() => {
    const set = (node, name, value) => node.getAttribute(name) === value || node.setAttribute(name, value);
    // ipywidgets gives a slider no name and only an index as its value, a picture no text, and says no change aloud.
    const name = view => {
        for (const handle of view.querySelectorAll("[role=slider], .ui-slider-handle")) {
            const [label, readout] = [".widget-label", ".widget-readout"].map(
                part => handle.closest(".widget-hslider")?.querySelector(part)?.textContent ?? "");
            set(handle, "role", "slider");
            set(handle, "aria-label", label);
            set(handle, "aria-valuetext", readout);
        }
        const asked = view.querySelector(".gradaccum-asks .widget-html-content");
        if (asked) {
            set(view, "role", "group");
            set(view, "aria-label", asked.textContent);
        }
        for (const text of view.querySelectorAll(".gradaccum-says .widget-html-content")) {
            set(text, "aria-live", "polite");
            view.querySelectorAll("img").forEach(picture => set(picture, "alt", text.textContent.trim()));
        }
    };
    const found = () => {
        const views = document.querySelectorAll(".gradaccum-view:not([data-named])");
        for (const view of views) {
            view.dataset.named = "";
            new MutationObserver(() => name(view)).observe(
                view, {subtree: true, childList: true, characterData: true, attributeFilter: ["aria-valuetext"]});
            name(view);
        }
        return views.length;
    };
    if (found()) return;
    const wait = new MutationObserver(() => found() && wait.disconnect());  // the view may come after this
    wait.observe(document.body, {subtree: true, childList: true});
    setTimeout(() => wait.disconnect(), 60000);
})()
