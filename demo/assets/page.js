// Pictures may be dropped anywhere on the page, or pasted. Both go through the upload button, so
// that there is one way in.
(() => {
  const input = () => document.querySelector("input[type=file]"); // there is only one

  function give(file) {
    const files = new DataTransfer();
    files.items.add(file);
    input().files = files.files;
    input().dispatchEvent(new Event("change", { bubbles: true }));
  }

  const hasFiles = (transfer) => transfer && [...transfer.types].includes("Files");

  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    give(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (!file) return; // text, into a number field for example
    event.preventDefault();
    give(file);
  });
  document.addEventListener(
    "click",
    (event) => {
      input().accept = "image/*"; // phones then offer their gallery and camera
      if (event.target.closest(".invitation")) input().click();
    },
    true, // before the button's own handler
  );
  document.documentElement.classList.add("takes-pictures");
})();
